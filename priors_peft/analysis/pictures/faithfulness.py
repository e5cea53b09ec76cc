"""Picture of what reading a prompt as text loses, and of what each virtual token is worth."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import COLOURS, DETAILED, GREY, adapter_rows, add_legend, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Losses of an adapter in the order of the legend, with its words and their markers.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt_nll": ("the prompt", {"marker": "o", "color": COLOURS[0]}),
    "hardened_nll": ("its nearest tokens instead", {"marker": "X", "color": COLOURS[1]}),
    "initial_nll": ("its start instead", {"marker": "D", "color": GREY, "markerfacecolor": "none"}),
    "no_prompt_nll": ("no prompt", {"marker": "|", "color": "black", "markersize": 12, "markeredgewidth": 2}),
}
LOSS_UNIT = "loss (nats per answer token)"


def measured_losses(adapters: Sequence[claims.Part]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those of `LOSSES` that any adapter has."""
    return {
        key: look
        for key, look in LOSSES.items()
        if any(adapter["faithfulness"].get(key) is not None for adapter in adapters)
    }


# Most bars that their words fit under.
_NAMED = 24


def draw(analysis: claims.Part) -> "Figure | None":
    adapters = [adapter for adapter in analysis["adapters"] if adapter.get("faithfulness")]
    title = claims.faithfulness_title(adapters)
    if title is None:
        return None
    if len(adapters) <= DETAILED:
        rows = math.ceil(len(adapters) / 2)
        heights = [0.6 + 0.3 * len(adapters), *[2.1] * rows]
        figure = new_figure(title, 0.4 + sum(heights))
        parts: Any = figure.subfigures(2, 1, height_ratios=[heights[0], sum(heights[1:])])
        above, below = parts
        losses = above.subplots()
        axes = below.subplots(rows, min(2, len(adapters)), squeeze=False).ravel()
        for axis, adapter in zip(axes, adapters, strict=False):
            _bars(axis, adapter)
        for axis in axes[len(adapters) :]:
            axis.set_visible(False)
    else:
        figure = new_figure(title, 0.9 + 0.32 * len(adapters))
        losses, worth = figure.subplots(1, 2)
        _strips(worth, adapters)
    _losses(losses, adapters)
    entries = dict(measured_losses(adapters).values())
    add_legend(above if len(adapters) <= DETAILED else figure, entries, loc="outside lower left", ncols=4)
    return figure


def _losses(axis: "Axes", adapters: Sequence[claims.Part]) -> None:
    """A row for each adapter: with it, with what it reads as, with its start, without it."""
    for place, adapter in enumerate(adapters):
        losses = {key: adapter["faithfulness"].get(key) for key in LOSSES}
        found = [loss for loss in losses.values() if loss is not None]
        axis.plot([min(found), max(found)], [place, place], color="#D9D9D9", linewidth=3, zorder=1)
        for key, loss in losses.items():
            if loss is not None:
                axis.plot(loss, place, linestyle="none", **{"markersize": 6, **LOSSES[key][1]})
    adapter_rows(axis, adapters)
    axis.set_xlabel(LOSS_UNIT + ", lower is better")


def _bars(axis: "Axes", adapter: claims.Part) -> None:
    """A bar for each virtual token, with its nearest word where there is room."""
    found = adapter["faithfulness"]["ablations"] or []
    places, worth = [each["index"] for each in found], array([each["increase"] for each in found])
    axis.bar(places, worth, color=np.where(worth > 0, COLOURS[0], COLOURS[1]))
    if len(found) <= _NAMED:
        words = [drawable(nearest_word(adapter, place), 12) or str(place) for place in places]
        axis.set_xticks(places, words, rotation=90, fontsize=7)
    else:
        axis.set_xlabel("virtual token")
    axis.axhline(0, color=GREY, linewidth=0.7)
    axis.grid(axis="x", visible=False)
    axis.set_title(f"{drawable(adapter['name'], 20)}: without each token", loc="left")
    axis.set_ylabel("added loss (nats)")


def nearest_word(adapter: claims.Part, index: int) -> str:
    """The word that a virtual token lies nearest to, empty where there is none."""
    rows = (adapter.get("tokens") or {}).get("virtual_tokens") or []
    return rows[index]["nearest"][0]["text"] if index < len(rows) else ""


def _strips(axis: "Axes", adapters: Sequence[claims.Part]) -> None:
    """A row for each adapter, a dot for each virtual token."""
    for place, adapter in enumerate(adapters):
        found = adapter["faithfulness"]["ablations"] or []
        heights = [place - 0.3 + 0.6 * each["index"] / max(1, len(found) - 1) for each in found]
        axis.plot([each["increase"] for each in found], heights, ".", color=COLOURS[0], markersize=4)
    axis.axvline(0, color=GREY, linewidth=0.7)
    adapter_rows(axis, adapters)
    axis.set_yticklabels([])
    axis.set_xlabel("loss without it minus with it (nats)")
    axis.set_title("worth of each virtual token", loc="left")
