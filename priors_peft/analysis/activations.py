"""Activations of several tasks: pooled without padding, of equal lengths, and how separable they are as a number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..names import check_at_least, check_choice
from .common import Result, canonical_order, check_points


POOLS = ("mean", "last")
ENDS = ("start", "end")


def pool(hidden: Tensor, mask: Tensor, how: str = "mean") -> Tensor:
    """One vector a row of hidden states; padding, on either side, does not count, whatever stands there.

    Args:
        hidden: Shape `[B, L, d]`.
        mask: 1 where there is a token, 0 where there is padding, shape `[B, L]`.
        how: `"mean"` over tokens, or the `"last"` token.

    Returns:
        Shape `[B, d]`, float32.

    Raises:
        ValueError: Shapes don't belong together, a row has no token, or a hidden state of a token is not finite.
    """
    check_choice("how", how, POOLS)
    if not isinstance(hidden, Tensor) or hidden.ndim != 3 or not hidden.is_floating_point() or hidden.numel() == 0:
        got = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden must be a floating-point tensor of shape [B, L, d] that is not empty, got {got}")
    if mask.shape != hidden.shape[:2]:
        raise ValueError(f"mask must have shape {list(hidden.shape[:2])} like hidden, got {list(mask.shape)}")
    keep = mask.to(hidden.device) != 0
    empty = (~keep.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask must leave a token in each row, got none in rows {empty[:10]}: leave those rows out")
    check_points("hidden where mask is 1", hidden[keep], "[n, d]")
    if how == "last":
        last = keep.shape[1] - 1 - keep.flip(1).int().argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last].float()
    # In float64, so that how much padding stands beside a row shows in no digit that is kept.
    states = torch.where(keep[..., None], hidden, 0).double()
    return (states.sum(1) / keep.sum(1, keepdim=True)).float()


def match_lengths(
    tasks: Mapping[str, Sequence[Sequence[int]]], keep: str = "end", minimum: int = 1
) -> dict[str, list[list[int]]]:
    """Cut the token rows of several tasks so that each task has the same lengths, equally often.

    Tasks are cut to the number of rows that all have. Then the longest rows of each are cut to the shortest of them,
    the second longest likewise, and so on, which loses the fewest tokens.

    Args:
        tasks: Token ids of each row, by task.
        keep: Which end of a row stays: `"end"`, where a model is about to answer, or `"start"`.
        minimum: Fewest tokens of a row; ranks at which a task falls below are left out of all.

    Returns:
        For each task its rows in the order they came, all tasks with the same number of rows.

    Raises:
        ValueError: There are fewer than 2 tasks, a task has no rows, or none are long enough.
    """
    check_choice("keep", keep, ENDS)
    check_at_least("minimum", minimum, 1)
    check_at_least("the number of tasks", len(tasks), 2, "lengths are matched between tasks")
    empty = [name for name, rows in tasks.items() if not len(rows)]
    if empty:
        raise ValueError(f"tasks must have rows each, got none for {', '.join(empty)}: leave them out or pass data")
    count = min(map(len, tasks.values()))
    ranked = {name: sorted(range(count), key=lambda i: -len(rows[i])) for name, rows in tasks.items()}  # noqa: B023
    lengths = [min(len(tasks[name][order[rank]]) for name, order in ranked.items()) for rank in range(count)]
    if max(lengths) < minimum:
        raise ValueError(f"minimum must be at most the {max(lengths)} tokens that each task has, got {minimum}")
    matched = {}
    for name, order in ranked.items():
        cut = {row: length for row, length in zip(order, lengths, strict=True) if length >= minimum}
        rows = tasks[name]
        matched[name] = [
            list(rows[row][: cut[row]] if keep == "start" else rows[row][len(rows[row]) - cut[row] :])
            for row in sorted(cut)
        ]
    return matched


@dataclass(frozen=True, eq=False)
class Separability(Result):
    """How well labelled points can be told apart.

    Attributes:
        silhouette: Mean silhouette coefficient (Rousseeuw 1987) of the points as they are, Euclidean, −1 to 1.
        probe_accuracy: Of a linear probe on points it has not seen: balanced over classes, mean over folds.
        probe_std: Over folds.
        chance: Accuracy of a probe that knows nothing, 1 / number of classes.
        counts: Points of each class.
        folds: Of the cross-validation.
        seed: Of the folds.
    """

    silhouette: float
    probe_accuracy: float
    probe_std: float
    chance: float
    counts: dict[str, int]
    folds: int
    seed: int


def separability(
    points: Tensor,
    labels: Sequence[str],
    folds: int = 5,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Separability:
    """Silhouette and linear-probe accuracy of labelled points, the same whatever their order.

    The probe is logistic regression (scikit-learn, L2 penalty 1) on coordinates standardized by its training part.
    Accuracy is balanced over classes, so that chance is 1 / number of classes however many points each has.

    Args:
        points: Shape `[n, d]`.
        labels: Class of each point, at least two classes with `folds` points each.
        folds: Parts of the cross-validation, each with the classes' shares.
        seed: Of the parts.
        groups: What a point belongs to (a document, a module): a group is never on both sides of a split.

    Raises:
        ValueError: There is one class only, a class has fewer points or groups than folds, or lengths differ.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import silhouette_score
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    points = check_points("points", points, "[n, d]")
    check_at_least("folds", folds, 2)
    for argument, given in (("labels", labels), ("groups", groups)):
        if given is not None and len(given) != len(points):
            raise ValueError(f"{argument} must have one entry for each of the {len(points)} points, got {len(given)}")
    names = np.array([str(label) for label in labels])
    counts = {str(name): int(count) for name, count in zip(*np.unique(names, return_counts=True), strict=True)}
    if len(counts) < 2:
        raise ValueError(f"labels must name at least 2 classes, got {', '.join(counts)}: add another task")
    units = np.array([str(group) for group in groups]) if groups is not None else np.arange(len(names))
    what = "points" if groups is None else "groups"
    for name in counts:
        own = len(set(units[names == name]))
        if own < folds:
            raise ValueError(f"folds must be at most the {own} {what} of class {name!r}, got {folds}: add {what}")
    values = points.double().cpu().numpy()
    order = canonical_order(values)
    # Equal points must not keep the order they came in.
    keys = (names[order],) if groups is None else (units[order], names[order])
    order = order[np.lexsort(keys)]
    values, names, units = values[order], names[order], units[order]
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    parts = splitter(folds, shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    with threadpool_limits(1):
        accuracies = cross_val_score(
            probe, values, names, cv=parts, groups=None if groups is None else units, scoring="balanced_accuracy"
        )
        silhouette = float(silhouette_score(values, names))
    return Separability(
        silhouette=silhouette,
        probe_accuracy=float(accuracies.mean()),
        probe_std=float(accuracies.std()),
        chance=1 / len(counts),
        counts=counts,
        folds=folds,
        seed=seed,
    )
