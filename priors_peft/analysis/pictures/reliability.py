"""Reliability diagram: how often the likeliest token is right, by how likely it is said to be."""

from typing import TYPE_CHECKING, Any

import numpy as np

from ...calibration import Calibration
from .. import claims
from .style import COLOURS, GREY, add_legend, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 3
_RIGHT, _OVER, _UNDER = COLOURS[0], "#EFB58A", "#86CDB4"


def draw(calibrations: claims.Part) -> "Figure | None":
    """A panel for each of at most three calibrations, above it the number of tokens in each interval.

    By chance is the error that perfect calibration would show on as many tokens.

    Args:
        calibrations: `Calibration.to_dict()` by what was measured, such as `"this prompt"`.
    """
    found = {name: one for name, one in calibrations.items() if sum(one["counts"])}
    if not found:
        return None
    shown = list(found.items())[-_MOST:]
    errors = "; ".join(f"{name} {one['error']:.3f}" for name, one in shown)
    figure = new_figure(f"Expected calibration error (0 is best): {errors}", 4.3)
    axes = figure.subplots(2, len(shown), squeeze=False, sharex=True, sharey="row", height_ratios=[1, 3])
    for place, (name, one) in enumerate(shown):
        _counts(axes[0][place], name, one)
        _bars(axes[1][place], one)
    axes[0][0].set_ylabel("tokens")
    axes[1][0].set_ylabel("how sure, and how often right")
    entries: dict[str, dict[str, Any]] = {
        "as sure as right": {"color": _RIGHT, "marker": "s", "markersize": 8},
        "surer than right": {"color": _OVER, "marker": "s", "markersize": 8},
        "right more often than sure": {"color": _UNDER, "marker": "s", "markersize": 8},
        "perfectly calibrated": {"color": GREY, "linestyle": "--"},
    }
    add_legend(figure, entries, loc="outside lower left", ncols=4)
    return figure


def _edges(one: claims.Part) -> tuple[np.ndarray, float]:
    """Middles of the intervals, and their width."""
    count = len(one["counts"])
    return (np.arange(count) + 0.5) / count, 1 / count


def _counts(axis: "Axes", name: str, one: claims.Part) -> None:
    middles, width = _edges(one)
    counts = array(one["counts"])
    axis.bar(middles, counts, width * 0.9, color="#BDBDBD")
    for middle, count in zip(middles, one["counts"], strict=True):
        if count:
            text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
            axis.annotate(text, (middle, count), (0, 1), textcoords="offset points", ha="center", fontsize=6.5)
    chance = Calibration(**one).chance
    told = f"ECE {one['error']:.3f} (by chance {chance:.3f})\n{int(counts.sum()):,} tokens"
    axis.set_title(f"{drawable(name, 40)}\n{told}", loc="left")
    axis.margins(y=0.25)
    axis.grid(axis="x", visible=False)


def _bars(axis: "Axes", one: claims.Part) -> None:
    middles, width = _edges(one)
    known = array(one["counts"]) > 0
    middles, sure, right = middles[known], array(one["confidence"])[known], array(one["accuracy"])[known]
    low, high, over = np.minimum(sure, right), np.maximum(sure, right), sure > right
    axis.bar(middles, low, width * 0.9, color=_RIGHT)
    axis.bar(middles, high - low, width * 0.9, low, color=np.where(over, _OVER, _UNDER))
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    axis.set_xlabel("probability of the likeliest token")
