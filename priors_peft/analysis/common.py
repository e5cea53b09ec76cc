"""What all analyses share: results that turn into JSON, checks of arguments, and orders and samples without chance."""

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..names import check_at_least


# Bounds of every band that shows what the prior itself expects, in percent.
BAND = (5.0, 95.0)

# What languages are told with, and pictures and the report are made with.
MADE_WITH = ("py3langid", "matplotlib", "plotly", "jinja2")

Ids = Tensor | Sequence[int]


class Result:
    """Base of the dataclasses that analyses return."""

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; JSON has no nan and no infinity, so those become None."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """Any result, or a dictionary or list of them, as JSON takes it."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.to_dict() if is_dataclass(value) else value  # type: ignore[union-attr]


def check_installed(what: str, packages: Iterable[str], install: str = '"priors_peft[analysis]"') -> None:
    """Raise `ImportError` with the command that mends it unless all packages (names of imports) are there."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(
            f"{what} needs {', '.join(missing)}, which {verb} not installed. Run `pip install {install}`"
        )


def check_points(name: str, points: Any, shape: str) -> Tensor:
    """`points` without its gradient, or `ValueError` if it is not finite, empty, or not of this shape.

    Args:
        name: Of the argument.
        points: What was passed.
        shape: For example `"[P, d]"`, or `"[..., P, d]"` where more dimensions may come first.
    """
    sizes = shape.strip("[]").split(", ")
    least = len(sizes) - sizes.count("...")
    if (
        not isinstance(points, Tensor)
        or not points.is_floating_point()
        or not (points.ndim >= least if "..." in sizes else points.ndim == least)
        or points.numel() == 0
    ):
        got = f"{points.dtype} {list(points.shape)}" if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"{name} must be a floating-point tensor of shape {shape} that is not empty, got {got}")
    # Both ends carry a nan along, and nothing as large as the points is made.
    if not all(map(math.isfinite, torch.stack(points.detach().aminmax()).tolist())):
        bad = int((~torch.isfinite(points)).any(-1).sum())
        raise ValueError(
            f"{name} must be finite, got {bad} of {points[..., 0].numel()} vectors with inf or nan: leave them out, or "
            "load a checkpoint from before they appeared"
        )
    return points.detach()


def check_same_width(first: str, one: Tensor, second: str, other: Tensor) -> None:
    """Raise `ValueError` unless both have the same last dimension."""
    if one.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{first} must be as wide as {second}, got widths {one.shape[-1]} and {other.shape[-1]}: they must come "
            "from the same base model"
        )


def check_same_shape(first: str, one: Tensor, second: str, other: Tensor) -> None:
    """Raise `ValueError` unless both have the same shape."""
    if one.shape != other.shape:
        raise ValueError(f"{first} must have the shape of {second}, got {list(one.shape)} and {list(other.shape)}")


def kept_rows(total: int, excluded: Ids | None) -> Tensor:
    """Ids of the rows that are not excluded, ascending."""
    keep = torch.ones(total, dtype=torch.bool)
    if excluded is not None:
        ids = torch.as_tensor(excluded, dtype=torch.long).cpu().flatten()
        if len(ids) and not (0 <= int(ids.min()) and int(ids.max()) < total):
            raise ValueError(
                f"excluded must be ids of the vocabulary's {total} rows, 0 to {total - 1}, got {int(ids.min())} to "
                f"{int(ids.max())}"
            )
        keep[ids] = False
    if not keep.any():
        raise ValueError(f"excluded must leave rows of the vocabulary, got all {total}")
    return keep.nonzero().squeeze(-1)


def sample_rows(total: int, count: int, seed: int, excluded: Ids | None = None) -> Tensor:
    """Ids of at most `count` rows drawn without replacement from those not excluded, ascending."""
    check_at_least("count", count, 1)
    kept = kept_rows(total, excluded)
    chosen = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:count]
    return kept[chosen].sort().values


def canonical_order(points: np.ndarray) -> np.ndarray:
    """An order of the rows of `points` `[n, d]` that depends on their values only, so that results can't on order."""
    rows = np.ascontiguousarray(points + 0.0)  # -0.0 becomes 0.0
    return np.argsort(rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel(), kind="stable")


def percentile_among(values: Tensor, null: Tensor, tolerance: float = 0.0) -> Tensor:
    """Share of a null's values that are lower, ties counted half, in percent.

    Args:
        values: Shape `[..., m]`.
        null: Shape `[n]`, or `[n, m]` for a null of its own for each.
        tolerance: Values this near count as tied.

    Returns:
        Shape `[..., m]`, 0 to 100.
    """
    # As [m, n] and [m, ...], which is what a sorted search takes; one null for all is m = 1.
    single = null.ndim == 1
    ordered = null.double().reshape(len(null), -1).mT.contiguous().sort(-1).values
    flat = values.double().reshape(1, -1) if single else values.double().reshape(-1, values.shape[-1]).mT.contiguous()
    lower = torch.searchsorted(ordered, flat - tolerance)
    not_higher = torch.searchsorted(ordered, flat + tolerance, right=True)
    shares = (lower + not_higher).double() * 50 / len(null)
    return (shares if single else shares.mT).reshape(values.shape)


def band(draws: Tensor) -> Tensor:
    """The 5th and 95th percentile of draws `[n, ...]`, shape `[2, ...]`."""
    return torch.quantile(draws.double(), torch.tensor(BAND, dtype=torch.float64) / 100, dim=0)
