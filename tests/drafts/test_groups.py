"""Groups of users and items, the router between them, and the folder of pools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.drafts.folder import DraftPools, read_manifest
from rcllm.drafts.groups import GroupOptions, Member, Router, build_router, commonest_values, majority, one_group
from rcllm.drafts.lightgcn import _LAYERS, interaction_matrix, item_vectors, numbered, user_vector
from rcllm.errors import ConfigError, DataError
from tests.reference import lightgcn

pytest.importorskip("sklearn", reason="groups need scikit-learn")

PROMPT = (90, 91, 92, 93, 94)
GENRES = ("food", "books", "music")


def world(users: int = 60, seed: int = 0) -> dict[str, list[str]]:
    """Users who like one of three genres of ten items each."""
    rng = np.random.default_rng(seed)
    return {f"u{i}": [f"{GENRES[i % 3]}{j}" for j in rng.choice(10, 5, replace=False)] for i in range(users)}


def item_profiles() -> list[Member]:
    return [Member("item", f"{genre}{j}", (), (genre,)) for genre in GENRES for j in range(10)]


def user_profiles() -> list[Member]:
    histories = world()
    return [
        Member("user", u, tuple(items), tuple(i.rstrip("0123456789") for i in items)) for u, items in histories.items()
    ]


@pytest.fixture(scope="module")
def router() -> Router:
    return build_router(world(), [*item_profiles(), *user_profiles()], GroupOptions(num_groups=3, dimensions=4))


@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=5), min_size=3, max_size=8))
def test_vectors_are_a_lightgcn_without_training(histories: list[list[int]]) -> None:
    """close, 1e-4"""
    touched = interaction_matrix(histories, 8)
    assert touched.max() == 1.0
    dimensions = min(touched.shape) - 1
    values = np.linalg.svd(lightgcn_normal(touched.toarray()), compute_uv=False)
    if values[dimensions - 1] < 1e-3 or values[dimensions - 1] - values[dimensions] < 1e-3:
        return  # which vectors lead is left open by the data
    vectors = item_vectors(touched, dimensions)
    wanted = lightgcn.item_cosines(histories, 8, dimensions, _LAYERS)
    np.testing.assert_allclose(vectors @ vectors.T, wanted, atol=1e-4)


def lightgcn_normal(touched: np.ndarray) -> np.ndarray:
    users, items = np.maximum(touched.sum(1), 1), np.maximum(touched.sum(0), 1)
    return np.asarray(touched / np.sqrt(users[:, None] * items[None]))


def test_items_of_the_same_users_lie_close_and_seeds_are_kept() -> None:
    _, numbers = numbered(world())
    touched = interaction_matrix(numbers, 30)
    vectors = item_vectors(touched, 4, seed=1)
    assert (vectors == item_vectors(touched, 4, seed=1)).all()
    same = vectors @ vectors.T
    genre = np.arange(30) // 10
    within = same[genre[:, None] == genre[None]].mean()
    across = same[genre[:, None] != genre[None]].mean()
    assert within > 0.8 > 0.2 > across
    assert user_vector([0, 1], vectors) @ vectors[2] > 0.5


def test_vectors_of_too_little_data_are_zero() -> None:
    assert not item_vectors(interaction_matrix([[0]], 1), 8).any()
    assert item_vectors(interaction_matrix([[], []], 3), 8).shape == (3, 1)


# ---- the router -----------------------------------------------------------------------------------------------------


def test_users_and_items_of_one_genre_share_a_group(router: Router) -> None:
    for profiles in (item_profiles(), user_profiles()):
        groups = {(profile.attributes[0], router.route(profile)) for profile in profiles}
        assert len(groups) == 3
        assert {group for _, group in groups} == {f"{profiles[0].kind}-{i}" for i in range(3)}
    assert len(router.groups) == 6


def test_who_is_new_goes_by_items_then_by_attribute_then_to_the_largest_group(router: Router) -> None:
    known = {profile.attributes[0]: router.route(profile) for profile in user_profiles()}
    assert router.route(Member("user", "new", ("food1", "food2", "food3"), ("books",))) == known["food"]
    assert router.route(Member("user", "new", ("food1", "nowhere", "never"), ("books",))) == known["books"]
    assert router.route(Member("user", "new", (), ("music", "food", "food"))) == known["food"]
    assert router.route(Member("user", "new", (), ("poetry", "music"))) == known["music"]
    assert router.route(Member("user", "new")) == f"user-{router.default['user']}"
    by_genre = {profile.attributes[0]: router.route(profile) for profile in item_profiles()}
    assert router.route(Member("item", "new", (), ("music",))) == by_genre["music"]


def test_without_interactions_the_commonest_attributes_are_the_groups() -> None:
    profiles = [Member("item", str(i), (), (GENRES[min(i % 4, 2)],)) for i in range(20)]  # half of them music
    router = build_router({}, profiles, GroupOptions(num_groups=3))
    assert router.groups == ("user-0", "item-0", "item-1", "item-2")
    assert router.route(Member("item", "x", (), ("music",))) == "item-0"
    assert router.route(Member("item", "x", (), ("books",))) == "item-1"
    assert router.route(Member("item", "x", (), ("food",))) == "item-2"
    assert router.route(Member("user", "x")) == "user-0"


def test_one_group_takes_all_of_a_kind() -> None:
    assert one_group().groups == ("user-0", "item-0")
    assert one_group().route(Member("item", "x", (), ("a",))) == "item-0"


def test_votes_and_ties() -> None:
    a, ab = Member("user", "1", (), ("a",)), Member("user", "2", (), ("a", "b", "b"))
    assert majority([(1, a), (0, ab), (1, ab), (None, a)]) == {"a": 1, "b": 0}
    assert commonest_values([ab, a, a], 5) == {"a": 0, "b": 1}
    assert commonest_values([ab], 0) == {}


def test_a_router_is_the_same_after_saving_and_by_seed(router: Router, tmp_path: Path) -> None:
    router.save(tmp_path / "router.npz")
    again = Router.open(tmp_path / "router.npz")
    built = build_router(world(), [*item_profiles(), *user_profiles()], GroupOptions(num_groups=3, dimensions=4))
    for other in (again, built):
        assert (other.vectors == router.vectors).all()
        assert all((other.centres[kind] == router.centres[kind]).all() for kind in router.centres)
        assert (other.options, other.item_ids, other.by_attribute, other.default) == (
            router.options,
            router.item_ids,
            router.by_attribute,
            router.default,
        )
    (tmp_path / "router.npz").write_bytes((tmp_path / "router.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="not a whole router"):
        Router.open(tmp_path / "router.npz")


# ---- the folder of pools --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(router: Router, tmp_path: Path) -> Path:
    pools = DraftPools.create(router, "m")
    for number, profile in enumerate((*user_profiles()[:6], *item_profiles()[:12])):
        pools.learn(profile, [1, 2, 3, 1000 + number, 5])
    pools.save(tmp_path / "pools")
    return tmp_path / "pools"


def drafted(pools: DraftPools, profile: Member) -> set[int]:
    return set(pools.drafter_for(profile, PROMPT).draft((*PROMPT, 1, 2, 3), 64).token_ids.tolist()) - {5}


def test_a_profile_is_drafted_from_its_group_alone(folder: Path) -> None:
    pools = DraftPools.open(folder, "m")
    users = user_profiles()[:6]  # food, books, music, food, books, music
    for i, user in enumerate(users):
        assert drafted(pools, user) == {1000 + i % 3, 1003 + i % 3}
    assert drafted(pools, Member("item", "new", (), ("books",))) == {1016, 1017}


def test_saving_again_replaces_every_file(folder: Path) -> None:
    before = read_manifest(folder)
    pools = DraftPools.open(folder, "m")
    pools.learn(user_profiles()[0], [1, 2, 3, 2000, 5])
    pools.save(folder)
    after = read_manifest(folder)
    assert after.generation == before.generation + 1
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *after.files}
    assert not set(before.files) & set(after.files)
    assert drafted(DraftPools.open(folder, "m"), user_profiles()[3]) == {1000, 1003, 2000}
    assert drafted(pools, user_profiles()[1]) == {1001, 1004}


def test_a_save_that_was_killed_leaves_the_state_before_it(folder: Path) -> None:
    (folder / "router.g2.npz").write_bytes(b"half")
    (folder / "user-0.g2.safetensors.123.partial").write_bytes(b"half")
    pools = DraftPools.open(folder, "m")
    assert drafted(pools, user_profiles()[0]) == {1000, 1003}
    pools.save(folder)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *read_manifest(folder).files}


def test_erased_and_withdrawn_users_draft_for_nobody_else(folder: Path) -> None:
    pools = DraftPools.open(folder, "m")
    first, _, _, same_group, *_ = user_profiles()
    pools.withdraw([first.profile_id])
    pools.save(folder)
    pools = DraftPools.open(folder, "m")
    assert drafted(pools, same_group) == {1003}
    assert drafted(pools, first) == {1000, 1003}
    pools.erase([first.profile_id])
    pools.save(folder)
    assert drafted(DraftPools.open(folder, "m"), first) == {1003}


def test_own_text_alone_where_the_pools_say_so(router: Router, tmp_path: Path) -> None:
    pools = DraftPools.create(router, "m", "own")
    first, _, _, same_group, *_ = user_profiles()
    pools.learn(first, [1, 2, 3, 1000])
    pools.save(tmp_path)
    pools = DraftPools.open(tmp_path, "m")
    assert (drafted(pools, same_group), drafted(pools, first)) == (set(), {1000})


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected n"):
        DraftPools.open(folder, "n")
    with pytest.raises(DataError, match="no whole folder"):
        DraftPools.open(tmp_path / "nothing", "m")
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "version": 9}))
    with pytest.raises(ConfigError, match="format 9"):
        DraftPools.open(folder, "m")
    manifest.write_text(text[:50])
    with pytest.raises(DataError, match="cannot be read"):
        DraftPools.open(folder, "m")
    manifest.write_text(text)
    torn = next(folder.glob("user-1*"))
    torn.write_bytes(torn.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"user-1.*not whole"):
        DraftPools.open(folder, "m")
    torn.unlink()
    with pytest.raises(DataError, match=r"user-1.*missing"):
        DraftPools.open(folder, "m")
