"""Picture of shape and place over training, with the prior's band."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import COLOURS, GREY, add_legend, array, colours, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPREAD: dict[str, Any] = {"linewidth": 2.5, "marker": "_", "markersize": 7, "markeredgewidth": 1.5, "alpha": 0.7}

# Measures in the order they are drawn, with what their axes say.
MEASURES = {
    "effective_rank": "effective rank (directions)",
    "mean_pairwise_cosine": "mean pairwise cosine",
    "nearest_cosine": "cosine to nearest token",
    "norm": "length (Euclidean norm)",
    "norm_percentile": "length (percentile of vocabulary)",
    "radius": "Mahalanobis radius (prior std)",
    "drift": "drift from start (prior std)",
    "squared_mmd": "squared MMD to vocabulary",
}


def draw(analysis: claims.Part) -> "Figure | None":
    adapters = [adapter for adapter in analysis["adapters"] if (adapter.get("geometry") or {}).get("layers")]
    title = claims.geometry_title(adapters)
    if title is None:
        return None
    series = {adapter["name"]: adapter["geometry"]["layers"][0]["series"] for adapter in adapters}
    names = measured_names(series)
    rows = math.ceil((len(names) + 1) / 3)
    deep = any(len(adapter["geometry"]["layers"]) > 1 for adapter in adapters)
    figure = new_figure(title + " (embedding layer)" * deep, 2.1 * rows)
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    palette = colours(adapters)
    over_time = any(len(one["steps"]) > 1 for one in series.values())
    for axis, name in zip(axes, names, strict=False):
        for low, high, colour in bands(series, name, palette):
            axis.axhspan(low, high, color=colour, alpha=0.2, linewidth=0)
        for key, one in series.items():
            if name in one["measures"]:
                values = array(one["measures"][name]["values"])
                axis.plot(known_steps(one), values, color=palette[key][0], linewidth=1.3, marker=_marker(one))
                spread = one["measures"][name].get("posterior")
                if spread:
                    axis.plot(known_steps(one)[-1:] * 2, spread, color=palette[key][0], clip_on=False, **_SPREAD)
        axis.set_title(MEASURES[name], loc="left")
        axis.set_xlabel("training step" if over_time else "end of training")
        if not over_time:
            axis.set_xticks([])
    for axis in axes[len(names) :]:
        axis.axis("off")
    entries: dict[str, dict[str, Any]] = {key: {"color": colour, "linestyle": "-"} for colour, key in palette.values()}
    if any(measure.get("posterior") for one in series.values() for measure in one["measures"].values()):
        entries["its posterior, 5 to 95 %"] = {"color": GREY, "linestyle": "-"} | _SPREAD
    entries["random prompts, 5 to 95 %"] = {"color": "#D9D9D9", "linestyle": "-", "linewidth": 7}
    add_legend(axes[len(names)], entries, loc="upper left", fontsize=8 if len(entries) < 9 else 6)
    return figure


def measured_names(series: Mapping[str, claims.Part]) -> list[str]:
    """Measures that any of the adapters' series has, in the order they are drawn."""
    return [name for name in MEASURES if any(name in one["measures"] for one in series.values())]


def bands(
    series: Mapping[str, claims.Part], name: str, palette: Mapping[str, tuple[str, str]]
) -> list[tuple[float, float, str]]:
    """Low, high and colour of the bands of random prompts: each adapter's or task's own, grey where several share one."""
    found = {key: array(one["measures"][name]["band"]) for key, one in series.items() if name in one["measures"]}
    if len({palette[key][1] for key in found}) > len(COLOURS):
        together = np.stack(list(found.values()))
        return [(float(together[:, 0].min()), float(together[:, 1].max()), GREY)]
    of_colour: dict[str, list[np.ndarray]] = {}
    for key, bounds in found.items():
        of_colour.setdefault(palette[key][0], []).append(bounds)
    owners: dict[tuple[float, float], list[str]] = {}
    for colour, own in of_colour.items():
        low, high = min(bounds[0] for bounds in own), max(bounds[1] for bounds in own)
        owners.setdefault((round(float(low), 9), round(float(high), 9)), []).append(colour)
    return [(low, high, own[0] if len(own) == 1 else GREY) for (low, high), own in owners.items()]


def known_steps(series: claims.Part) -> list[int]:
    """Training steps of the snapshots; 0 where the only one is of an unknown step."""
    return [step or 0 for step in series["steps"]]


def _marker(series: claims.Part) -> str:
    return "o" if len(series["steps"]) == 1 else ""
