"""Picture of what reading a prompt as text loses, and of what each virtual token is worth."""

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
    "initial_nll": ("its start instead", {"marker": "D", "color": GREY, "markerfacecolor": "white"}),
    "no_prompt_nll": ("no prompt", {"marker": "|", "color": "black", "markersize": 12, "markeredgewidth": 2}),
}
LOSS_UNIT = "loss (nats per answer token)"


def draw(analysis: claims.Part) -> "Figure | None":
    adapters = [adapter for adapter in analysis["adapters"] if adapter.get("faithfulness")]
    title = claims.faithfulness_title(adapters)
    if title is None:
        return None
    detailed = len(adapters) <= DETAILED
    figure = new_figure(title, 0.9 + (1.7 if detailed else 0.32) * len(adapters))
    grid = figure.add_gridspec(len(adapters) if detailed else 1, 2)
    left = figure.add_subplot(grid[:, 0])
    for place, adapter in enumerate(adapters):
        losses = {key: adapter["faithfulness"].get(key) for key in LOSSES}
        found = [loss for loss in losses.values() if loss is not None]
        left.plot([min(found), max(found)], [place, place], color="#D9D9D9", linewidth=3, zorder=1)
        for key, loss in losses.items():
            if loss is not None:
                left.plot(loss, place, linestyle="none", **{"markersize": 6, **LOSSES[key][1]})
    adapter_rows(left, adapters)
    left.set_xlabel(LOSS_UNIT)
    left.set_title("lower is better", loc="left")
    if detailed:
        for place, adapter in enumerate(adapters):
            _bars(figure.add_subplot(grid[place, 1]), adapter, last=place == len(adapters) - 1)
    else:
        _strips(figure.add_subplot(grid[0, 1]), adapters)
    add_legend(figure, dict(LOSSES.values()), loc="outside lower left", ncols=4)
    return figure


def _bars(axis: "Axes", adapter: claims.Part, last: bool) -> None:
    """A bar for each virtual token; the three that matter most are named."""
    found = adapter["faithfulness"]["ablations"] or []
    places, worth = [each["index"] for each in found], array([each["increase"] for each in found])
    axis.bar(places, worth, color=np.where(worth > 0, COLOURS[0], COLOURS[1]))
    for each in sorted(found, key=lambda each: -each["increase"])[:3]:
        word = nearest_word(adapter, each["index"])
        axis.annotate(
            word and drawable(word, 12),
            (each["index"], max(each["increase"], 0)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axis.axhline(0, color=GREY, linewidth=0.7)
    axis.margins(y=0.2)
    axis.grid(axis="x", visible=False)
    axis.set_title(f"{drawable(adapter['name'], 24)}: worth of each token (nats)", loc="left")
    if last:
        axis.set_xlabel("virtual token left at the prior's mean")


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
