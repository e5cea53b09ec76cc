"""Pictures in a plane: groups of points (prompts, trajectories, vocabulary, activations) projected together.

Every projection is the same whatever the order of the groups and of the points in them: points are put into an order
of their own before anything is computed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..names import check_at_least
from .common import Result, canonical_order, check_installed, check_points, check_same_width


# What van der Maaten & Hinton (2008) reduce to by PCA before t-SNE.
PRE_DIMS = 50


@dataclass(frozen=True, eq=False)
class Projection(Result):
    """Groups of points in few dimensions.

    Attributes:
        method: `"pca"`, `"tsne"` or `"umap"`.
        points: Each group's coordinates, shape `[..., dims]` where the group was `[..., d]`.
        explained_variance: Share of the variance of what PCA was fitted on, component by component; None else.
        settings: What it was computed with: fitted groups, perplexity or neighbours, seed.
    """

    method: str
    points: dict[str, Tensor]
    explained_variance: list[float] | None
    settings: dict[str, Any]


def pca(groups: Mapping[str, Tensor], dims: int = 2, fit_on: Iterable[str] | None = None) -> Projection:
    """Principal components of some groups, and every group's coordinates along them.

    A component points to where its largest loading is positive, so that pictures don't flip.

    Args:
        groups: Points by name, each `[..., d]`.
        dims: Number of components.
        fit_on: Groups that decide mean and components; all if None.

    Raises:
        ValueError: A group is empty, of another width, or unknown, or there are fewer points than components.
    """
    names = _checked(groups)
    fitted = names if fit_on is None else list(fit_on)
    if not fitted or not set(fitted) <= set(names):
        raise ValueError(f"fit_on must name groups ({', '.join(names)}), got {fitted}")
    points, _ = _stacked({name: groups[name] for name in sorted(set(fitted))})
    width = points.shape[1]
    check_at_least("dims", dims, 1)
    if dims > min(len(points) - 1, width):
        raise ValueError(
            f"dims must be at most {min(len(points) - 1, width)} for {len(points)} points of width {width}, got {dims}: "
            "fit on more points"
        )
    mean, components, shares = _components(points, dims)
    coordinates = {
        name: ((_flat(groups[name]) - mean) @ components.mT).reshape(*groups[name].shape[:-1], dims) for name in names
    }
    return Projection("pca", coordinates, shares, {"fit_on": sorted(set(fitted)), "dims": dims})


def tsne(groups: Mapping[str, Tensor], perplexity: float = 30.0, seed: int = 0) -> Projection:
    """t-SNE (van der Maaten & Hinton 2008) of all groups together in a plane, with scikit-learn, from a PCA start.

    Points are first reduced to 50 dimensions by PCA. One thread computes it, so that the picture can't hang on how
    many there are. Distances between clusters in it mean nothing: see `equidistance` in `stability` for those of the
    full space.

    Args:
        groups: Points by name, each `[..., d]`; 1,560 points of width 576 took 5 s on one CPU core.
        perplexity: Effective number of neighbours, >= 1. Clipped to (n - 1) / 3 for n points; what was used is in
            `settings`.
        seed: Of the optimization.

    Raises:
        ValueError: A group is empty or of another width, there are fewer than 4 points, or the perplexity is < 1.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if not perplexity >= 1:
        raise ValueError(f"perplexity must be >= 1, got {perplexity!r}")
    points, place = _reduced(groups, 4)
    used = min(float(perplexity), (len(points) - 1) / 3)
    with threadpool_limits(1):
        model = TSNE(perplexity=used, init=_start(points), learning_rate="auto", random_state=seed, n_jobs=1)
        coordinates = model.fit_transform(points.numpy())
    settings = {"perplexity": used, "seed": seed, "pca_dims": points.shape[1]}
    return Projection("tsne", place(coordinates), None, settings)


def umap(groups: Mapping[str, Tensor], neighbors: int = 15, min_dist: float = 0.1, seed: int = 0) -> Projection:
    """UMAP (McInnes et al. 2018) of all groups together in a plane, where `umap-learn` is installed.

    Args:
        groups: Points by name, each `[..., d]`.
        neighbors: Size of a neighbourhood, >= 2. Clipped to n - 1 for n points.
        min_dist: How near points may come in the picture, >= 0.
        seed: Of the optimization, which one thread computes.

    Raises:
        ImportError: `umap-learn` is not installed.
        ValueError: A group is empty or of another width, there are fewer than 4 points, or a setting is not valid.
    """
    check_at_least("neighbors", neighbors, 2)
    if not min_dist >= 0:
        raise ValueError(f"min_dist must be >= 0, got {min_dist!r}")
    points, place = _reduced(groups, 4)
    check_installed("UMAP", ["umap"], "umap-learn")
    from umap import UMAP

    used = min(neighbors, len(points) - 1)
    model = UMAP(n_neighbors=used, min_dist=min_dist, init=_start(points), random_state=seed, n_jobs=1)
    settings = {"neighbors": used, "min_dist": min_dist, "seed": seed, "pca_dims": points.shape[1]}
    return Projection("umap", place(model.fit_transform(points.numpy())), None, settings)


def _checked(groups: Mapping[str, Tensor]) -> list[str]:
    if not groups:
        raise ValueError("groups must not be empty, got none: pass points by name, such as {'prompt': prompt}")
    names = list(groups)
    for name in names:
        check_points(f"groups[{name!r}]", groups[name], "[..., d]")
        check_same_width(f"groups[{name!r}]", groups[name], f"groups[{names[0]!r}]", groups[names[0]])
    return names


def _flat(group: Tensor) -> Tensor:
    return group.detach().double().cpu().reshape(-1, group.shape[-1])


def _stacked(groups: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All points in their canonical order `[n, d]`, and the order: which point of the groups in turn each is."""
    points = torch.cat([_flat(group) for group in groups.values()])
    order = torch.from_numpy(canonical_order(points.numpy()))
    return points[order], order


def _components(points: Tensor, dims: int) -> tuple[Tensor, Tensor, list[float]]:
    """Mean `[d]`, components `[dims, d]` and their shares of the variance, of points `[n, d]`."""
    mean = points.mean(0)
    centred = points - mean
    if len(points) > points.shape[1]:
        values, vectors = torch.linalg.eigh(centred.mT @ centred)
        variances, components = values.flip(0).clamp_min(0), vectors.mT.flip(0)
    else:
        _, values, components = torch.linalg.svd(centred, full_matrices=False)
        variances = values.square()
    components = components[:dims]
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    total = variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return mean, components * largest.sign(), (variances[:dims] / total).tolist()


def _reduced(groups: Mapping[str, Tensor], least: int) -> tuple[Tensor, Any]:
    """Points for a neighbour embedding, and what puts its coordinates back into the groups."""
    names = _checked(groups)
    points, order = _stacked(groups)
    check_at_least("the number of points", len(points), least, "add a vocabulary sample or more prompts")
    dims = min(PRE_DIMS, len(points) - 1, points.shape[1])
    mean, components, _ = _components(points, dims)
    sizes = [groups[name].shape[:-1].numel() for name in names]

    def place(coordinates: np.ndarray) -> dict[str, Tensor]:
        back = torch.empty(len(order), coordinates.shape[1], dtype=torch.float64)
        back[order] = torch.from_numpy(coordinates).double()
        parts = zip(names, back.split(sizes), strict=True)
        return {name: part.reshape(*groups[name].shape[:-1], coordinates.shape[1]) for name, part in parts}

    return ((points - mean) @ components.mT).float(), place


def _start(points: Tensor) -> np.ndarray:
    """The first two principal components, small, as Kobak & Berens (2019) advise: the picture keeps its bearings."""
    first = points[:, :2] if points.shape[1] > 1 else torch.nn.functional.pad(points, (0, 1))
    return (1e-4 * first / first[:, 0].std().clamp_min(1e-12)).numpy()
