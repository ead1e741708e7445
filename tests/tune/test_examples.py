"""Training examples: whose they are, what is in them, what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rcllm.core.ranking import Interaction, Item, ItemId, UserId
from rcllm.data import Catalogue, Dataset, split_of
from rcllm.data.neighbours import with_neighbours
from rcllm.errors import ConfigError, DataError
from rcllm.tune.config import ExampleConfig, check_examples, examples_for
from rcllm.tune.examples import Fold, TrainingSet, batch_of, joined_catalogue, training_sets
from rcllm.tune.loss import listwise_loss
from tests.tune.test_train import EXAMPLES, log


def _small(num_items: int, num_users: int = 40, name: str = "small") -> Dataset:
    items = [Item(ItemId(f"é{n}"), {"title": f"thing {n}"} if n else {}) for n in range(num_items)]
    rows = [
        Interaction(UserId(f"u{user}"), items[(user + step) % num_items].item_id, float(step))
        for user in range(num_users)
        for step in range(min(4, num_items))
    ]
    return Dataset(name, Catalogue(items), tuple(rows))


def test_a_history_is_what_came_before_the_target_and_no_more_than_asked() -> None:
    data = log(200)
    of_user: dict[str, list[str]] = {}
    for row in data.interactions:
        of_user.setdefault(f"log/{row.user_id}", []).append(f"log/{row.item_id}")
    source = TrainingSet(data, replace(EXAMPLES, num_history=2, min_history=1))
    for number in range(12):
        for request in batch_of([source], number, seed=1):
            items = of_user[str(request.user_id)]
            at = items.index(str(request.positive))
            history = [str(event.item_id) for event in request.history]
            assert history == items[at - len(history) : at]
            assert 1 <= len(history) <= 2


def test_a_prompt_of_one_event_needs_no_more_before_its_target() -> None:
    """A regression: with fewer events in a prompt than were asked for before a target, no target was ever found."""
    source = TrainingSet(log(200), replace(EXAMPLES, num_history=1, min_history=2))
    assert {len(request.history) for request in source.batch(np.random.default_rng(0))} == {1}
    two = replace(_small(9), interactions=tuple(row for row in _small(9).interactions if row.timestamp < 2))
    assert TrainingSet(two, source.config).validation(1), "users of two events are learnt from, and hold out"


def test_no_target_stands_in_its_own_history() -> None:
    """A regression: a ranker learnt that a candidate which the history names is the one to choose."""
    data = _small(9)
    again = [replace(row, timestamp=row.timestamp + 10) for row in data.interactions if row.timestamp < 3]
    source = TrainingSet(replace(data, interactions=(*data.interactions, *again)), EXAMPLES)
    asked = [each for number in range(8) for each in batch_of([source], number, seed=0)]
    assert all(each.positive not in [event.item_id for event in each.history] for each in asked)
    assert not source.others, "the last of each user is not new"


def test_negatives_are_taken_in_turns_and_never_what_the_user_touched() -> None:
    source = TrainingSet(log(200), replace(EXAMPLES, num_candidates=8, negatives=("uniform", "retrieved")))
    touched = {}
    for row in log(200).interactions:
        touched.setdefault(f"log/{row.user_id}", set()).add(f"log/{row.item_id}")
    for request in batch_of([source], 3, seed=0):
        others = set(request.candidates) - {request.positive}
        assert len(others) == 7
        assert not others & touched[str(request.user_id)]


def test_a_catalogue_that_is_too_small_gives_fewer_candidates() -> None:
    source = TrainingSet(_small(6), replace(EXAMPLES, num_candidates=20, min_history=1))
    for request in batch_of([source], 0, seed=0):
        assert len(request.candidates) == 3  # the positive, and the two items that the user never touched
        assert request.positive in request.candidates


def test_validation_users_are_not_training_users_and_stay_the_same() -> None:
    source = TrainingSet(log(200), EXAMPLES)
    asked = source.validation(5)
    assert asked == TrainingSet(log(200), EXAMPLES).validation(5)
    assert {split_of(UserId(str(request.user_id).removeprefix("log/"))) for request in asked} == {"validation"}
    assert all(len(request.candidates) == 20 for request in asked)
    assert len(source.validation(500)) == len(source.others) < 500, "as many as there are"


def test_two_sources_share_a_catalogue_and_both_are_drawn_from() -> None:
    sources = [TrainingSet(log(60), EXAMPLES), TrainingSet(_small(9), EXAMPLES)]
    joined = joined_catalogue(sources)
    assert len(joined) == 40 + 9
    assert joined[ItemId("small/é3")].fields["title"] == "thing 3"
    drawn = {str(batch_of(sources, number, 0)[0].user_id).split("/")[0] for number in range(20)}
    assert drawn == {"log", "small"}
    with pytest.raises(ConfigError, match="must differ in name"):
        joined_catalogue([sources[0], sources[0]])


def test_one_user_and_no_user() -> None:
    with pytest.raises(DataError, match="no training user has an item that was new after 2 or more events"):
        TrainingSet(replace(_small(9), interactions=()), EXAMPLES)
    one = next(user for user in range(40) if split_of(UserId(f"u{user}")) == "train")
    rows = tuple(row for row in _small(9).interactions if row.user_id == f"u{one}")
    source = TrainingSet(replace(_small(9), interactions=rows), EXAMPLES)
    assert {request.user_id for request in batch_of([source], 0, 0)} == {f"small/u{one}"}
    with pytest.raises(DataError, match="no validation user ends with an item that was new"):
        source.validation(1)


@pytest.mark.parametrize("mask", ["causal", "blocks"])
def test_what_suits_a_mask_can_be(mask: str) -> None:
    check_examples(examples_for(mask))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(EXAMPLES, num_candidates=1), "num_candidates must be at least 2, got 1"),
        (replace(EXAMPLES, borrowed=3), "at least one is drawn"),
        (replace(EXAMPLES, borrowed=-1), "borrowed must be at least 0, got -1"),
        (replace(EXAMPLES, num_history=0), "num_history must be at least 1, got 0"),
        (replace(EXAMPLES, prompts_per_batch=0), "prompts_per_batch must be at least 1, got 0"),
        (replace(EXAMPLES, negatives=()), "negatives must be a list of at least 1"),
        (replace(EXAMPLES, negatives=("nice",)), "must be one of uniform, popularity, retrieved, got 'nice'"),
    ],
)
def test_settings_that_cannot_be(config: ExampleConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_examples(config)


def test_the_loss_is_that_of_the_softmax() -> None:
    scores = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    loss = listwise_loss(scores, 2)
    shares = np.exp([1.0, -2.0, 0.5]) / np.exp([1.0, -2.0, 0.5]).sum()
    assert loss.item() == pytest.approx(-np.log(shares[2]))
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.numpy() == pytest.approx(shares - np.array([0, 0, 1]), abs=1e-6)


def test_a_users_own_choices_do_not_stand_in_their_scores() -> None:
    """Each user chose two items that nobody else chose both of: the scores of all candidates are zero."""
    data = _small(40)
    rows = [
        Interaction(UserId(f"u{user}"), ItemId(f"é{item}"), float(step))
        for user in range(40)
        for step, item in enumerate((user, (user * 7 + 3) % 40))
    ]
    config = replace(EXAMPLES, min_history=1, num_history=1)
    source = TrainingSet(replace(data, interactions=tuple(rows)), config, ("rank", "match"))
    pairs = {frozenset(row.item_id for row in rows if row.user_id == user) for user in {row.user_id for row in rows}}
    assert len(pairs) > 30
    for number in range(4):
        for request in source.batch(np.random.default_rng(number)):
            assert request.positive is not None
            assert request.volatile[request.positive] == {"rank": "none", "match": "zero"}


def test_neighbours_come_from_other_users_than_those_who_are_learnt_from() -> None:
    data = log(200)
    sources = training_sets(data, EXAMPLES, ("title", "neighbours"), ())
    assert [source.prefix for source in sources] == [f"log/{fold}/" for fold in range(4)]
    learnt_from = [{rows[0].user_id for rows in source.users} for source in sources]
    assert sum(map(len, learnt_from)) == len(set().union(*learnt_from)) == len(TrainingSet(data, EXAMPLES).users)
    joined = joined_catalogue(sources)
    assert len(joined) == 4 * len(data.catalogue)
    inside = [row for row in data.interactions if row.user_id in learnt_from[0]]
    fewer = replace(data, interactions=tuple(row for row in data.interactions if row not in inside))
    assert dict(TrainingSet(data, EXAMPLES, (), Fold(0)).dataset.catalogue) == dict(
        with_neighbours(TrainingSet(data, EXAMPLES).dataset.catalogue, fewer.interactions)
    )
