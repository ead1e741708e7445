"""What knowledge is worth: a small model of clicks with and without it, on users that it never saw.

Knows nothing of how texts were written or embedded. Invariant: every way is measured on the same pairs with the same
model; only the features of the knowledge differ, and all that is fitted is fitted on training users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.describe.clicks import Clicks, FloatArray
from rcllm.errors import ConfigError
from rcllm.fidelity.intervals import Interval, bootstrap

_COMPONENTS = 8  # of users and items each; their products are the interaction
_INVERSE_PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3)  # of the logistic regression
_WEIGHTS = (0.03, 0.1, 0.3, 1.0)  # of the features of knowledge: the smaller, the more they must say to be used
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class Knowledge:
    """Embeddings of the texts, rows of length one."""

    users: npt.NDArray[np.float32]  # [users, d]
    items: npt.NDArray[np.float32]  # [items, d]


@dataclass(frozen=True, slots=True)
class Worth:
    """One way, on held-out users. The AUC of a user is that of the user's own pairs (GAUC, arXiv 1706.06978)."""

    auc: float  # over all pairs
    user_auc: FloatArray  # [held-out users]
    user_log_loss: FloatArray  # [held-out users], mean over the user's pairs, nats

    @property
    def gauc(self) -> Interval:
        return bootstrap(self.user_auc[:, None], seed=0)[0]

    @property
    def log_loss(self) -> Interval:
        return bootstrap(self.user_log_loss[:, None], seed=0)[0]

    def gain_over(self, other: Worth) -> tuple[Interval, Interval]:
        """Paired differences of the same users: GAUC (more is better) and log-loss (less is better)."""
        changes = np.stack([self.user_auc - other.user_auc, self.user_log_loss - other.user_log_loss], axis=1)
        auc, loss = bootstrap(changes, seed=0)
        return auc, loss


def worth(clicks: Clicks, knowledge: Knowledge | None, seed: int = 0) -> Worth:
    """Logistic regression on `clicks.features` and, where there is knowledge, on what relates its user to its item.

    Of knowledge: the cosine of the two texts, the principal components of the item's, and the products of the
    components of both. How much it is penalised, and knowledge more, is what does best on training users that are left
    out in turn: otherwise more features would do harm by their number alone. Raises ConfigError where scikit-learn is
    missing.
    """
    learn = _learners()
    training = ~clicks.held_out[clicks.users]
    features, width = clicks.features, clicks.features.shape[1]
    scaled = [("plain", learn.preprocessing.StandardScaler(), slice(0, width))]
    grid: dict[str, list[Any]] = {"fit__C": list(_INVERSE_PENALTIES)}
    if knowledge is not None:
        features = np.concatenate([features, _related(learn, clicks, knowledge, seed)], axis=1)
        scaled.append(("knowledge", learn.preprocessing.StandardScaler(), slice(width, None)))
        grid["scale__transformer_weights"] = [{"knowledge": weight} for weight in _WEIGHTS]
    steps = [
        ("scale", learn.compose.ColumnTransformer(scaled)),
        ("fit", learn.linear_model.LogisticRegression(max_iter=2000)),
    ]
    folds = learn.model_selection.GroupKFold(_FOLDS)
    model = learn.model_selection.GridSearchCV(learn.pipeline.Pipeline(steps), grid, scoring="neg_log_loss", cv=folds)
    model.fit(features[training], clicks.clicked[training], groups=clicks.users[training])
    chances = model.predict_proba(features[~training])[:, 1]
    clicked, users = clicks.clicked[~training], clicks.users[~training]
    own = [users == user for user in np.flatnonzero(clicks.held_out)]
    score = learn.metrics.roc_auc_score
    loss = -np.log(np.clip(np.where(clicked, chances, 1.0 - chances), 1e-12, 1.0))
    return Worth(
        float(score(clicked, chances)),
        np.array([score(clicked[rows], chances[rows]) for rows in own]),
        np.array([loss[rows].mean() for rows in own]),
    )


def _related(learn: Any, clicks: Clicks, knowledge: Knowledge, seed: int) -> FloatArray:
    """[pairs, 1 + c + c²]"""
    users, items = knowledge.users.astype(np.float64), knowledge.items.astype(np.float64)
    components = min(_COMPONENTS, len(items), int((~clicks.held_out).sum()), users.shape[1])
    of_users = learn.decomposition.PCA(components, random_state=seed).fit(users[~clicks.held_out]).transform(users)
    of_items = learn.decomposition.PCA(components, random_state=seed).fit_transform(items)
    user, item = of_users[clicks.users], of_items[clicks.items]
    cosine = (users[clicks.users] * items[clicks.items]).sum(axis=1, keepdims=True)
    products = (user[:, :, None] * item[:, None, :]).reshape(len(user), -1)
    return np.concatenate([cosine, item, products], axis=1)


@dataclass(frozen=True, slots=True)
class _Learners:
    """The modules of scikit-learn that are used."""

    compose: Any
    decomposition: Any
    linear_model: Any
    metrics: Any
    model_selection: Any
    pipeline: Any
    preprocessing: Any


def _learners() -> _Learners:
    try:
        from sklearn import (  # noqa: PLC0415  the one place that needs it here: an optional dependency
            compose,
            decomposition,
            linear_model,
            metrics,
            model_selection,
            pipeline,
            preprocessing,
        )
    except ImportError as error:
        raise ConfigError("this needs scikit-learn; install it with: pip install 'rcllm[report]'") from error
    return _Learners(compose, decomposition, linear_model, metrics, model_selection, pipeline, preprocessing)


def compare(ways: Mapping[str, Worth], against: str) -> dict[str, tuple[Interval, Interval]]:
    """Of every other way, GAUC and log-loss minus those of `against`, on the same users."""
    return {name: way.gain_over(ways[against]) for name, way in ways.items() if name != against}
