"""Picture of prompts, their ways and the vocabulary in a plane."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import GREY, PALE, add_legend, array, colours, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(analysis: claims.Part) -> "Figure | None":
    projection = analysis.get("projection") or {}
    title = claims.projection_title(projection)
    if title is None:
        return None
    drawn = [(name, projection[name]) for name in PLANES if projection.get(name)]
    figure = new_figure(title, {1: 5.5, 2: 4.1}.get(len(drawn), 3.2))
    axes = figure.subplots(1, len(drawn), squeeze=False)[0]
    palette = colours(analysis["adapters"])
    entries: dict[str, dict[str, Any]] = {}
    for axis, (name, found) in zip(axes, drawn, strict=True):
        for group in sorted(found["groups"], key=lambda group: KINDS.index(group["kind"])):
            entries |= _project(axis, group, palette)
        if name == "pca":
            shares = found["explained_variance"]
            axis.set_xlabel(f"component 1 ({claims.percent(shares[0])} of variance)")
            axis.set_ylabel(f"component 2 ({claims.percent(shares[1])} of variance)")
            axis.set_title("PCA", loc="left")
        else:
            axis.set_title(plane_title(name, found), loc="left")
            axis.set_xlabel("no unit: only neighbours mean something" if len(drawn) < 3 else "no unit")
            axis.set_xticks([])
            axis.set_yticks([])
    add_legend(figure, entries, loc="outside lower left", ncols=3)
    return figure


PLANES = ("pca", "tsne", "umap")


def plane_title(name: str, found: claims.Part) -> str:
    """A projection's name with what it was computed with."""
    if name == "tsne":
        return f"t-SNE (perplexity {claims.number(found['perplexity'])}, seed {found['seed']})"
    return f"UMAP ({found['neighbors']} neighbours, seed {found['seed']})" if name == "umap" else "PCA"


# What is drawn first lies underneath.
KINDS = ("vocabulary", "draws", "activations", "trajectory", "initial", "posterior", "prompt")
KIND_LABELS = {
    "vocabulary": "vocabulary",
    "draws": "random prompts of the prior",
    "trajectory": "way through training",
    "initial": "start",
    "activations": "tokens in the tasks' rows",
    "posterior": "draws from the posterior",
    "prompt": "prompt",
}


def _project(axis: "Axes", group: claims.Part, palette: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Draw one group, and say what its legend entries look like."""
    points, kind = array(group["points"]).reshape(-1, 2), group["kind"]
    colour, label = palette.get(group["name"], (GREY, group["name"]))
    style: dict[str, Any]
    if kind in ("trajectory", "prompt", "initial", "posterior"):
        if kind == "posterior":
            style = {"marker": "o", "color": colour, "markersize": 3, "alpha": 0.35, "markeredgewidth": 0}
            axis.plot(points[:, 0], points[:, 1], linestyle="none", **style)
            return {KIND_LABELS[kind]: style | {"color": GREY, "markersize": 4}}
        if kind == "trajectory":
            for way in ways(group):
                axis.plot(points[way, 0], points[way, 1], color=colour, linewidth=0.6, alpha=0.6)
            return {KIND_LABELS[kind]: {"color": GREY, "linestyle": "-", "linewidth": 0.8}}
        style = {
            "marker": "o" if kind == "prompt" else "D",
            "color": colour,
            "markersize": 4.5 if kind == "prompt" else 3,
        }
        if kind == "initial":
            style |= {"markerfacecolor": "white", "markeredgewidth": 0.7}
        entry = {"start": style | {"color": GREY}} if kind == "initial" else {label: style}
    elif kind == "activations":
        style = {"marker": "^", "color": task_colour(group["name"], palette), "markersize": 3, "alpha": 0.6}
        entry = {KIND_LABELS[kind]: style | {"color": GREY}}
    else:
        style = {"marker": "." if kind == "vocabulary" else "x", "markersize": 3}
        style["color"] = PALE if kind == "vocabulary" else GREY
        entry = {KIND_LABELS[kind]: style | {"markersize": 5}}
    axis.plot(points[:, 0], points[:, 1], linestyle="none", **style)
    return entry


def task_colour(task: str, palette: Mapping[str, tuple[str, str]]) -> str:
    """A task's colour where adapters have their tasks' colours, else grey."""
    return {key: colour for colour, key in palette.values()}.get(task, GREY)


def ways(group: claims.Part) -> list[np.ndarray]:
    """Places of each virtual token's points in a trajectory's, in the order of training."""
    count = len(group["points"]) // max(1, len(set(group["steps"] or [0])))
    return [np.arange(token, len(group["points"]), count) for token in range(count)]
