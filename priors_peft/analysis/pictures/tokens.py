"""Picture of the nearest tokens: each virtual token beside random prompts and its start."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import claims
from .style import DETAILED, GREY, INHERITED, SIGNAL, adapter_rows, add_legend, drawable, new_figure, prior_band


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = {
    "cosine": "cosine to the nearest token",
    "l2": "minus the distance to the nearest token",
    "dot": "dot product with the nearest token",
}

_ROWS = 40

_Styles = Mapping[str, Mapping[str, Any]]


def draw(analysis: claims.Part) -> "Figure | None":
    adapters = [adapter for adapter in analysis["adapters"] if adapter.get("tokens")]
    # The level is there only if tokens are.
    title = claims.tokens_title(adapters, analysis["level"]) if adapters else None
    if title is None:
        return None
    styles: dict[str, dict[str, Any]] = {
        "signal": {"marker": "o", "color": SIGNAL},
        "inherited": {"marker": "s", "color": INHERITED},
        "chance": {"marker": "o", "color": GREY},
    }
    labels = {
        "signal": "nearer than random prompts",
        "inherited": "inherited (start or prior)",
        "chance": "no nearer",
    }
    tokens = [row for adapter in adapters for row in adapter["tokens"]["virtual_tokens"]]
    there = {claims.token_state(row, analysis["level"]) for row in tokens}
    legend: dict[str, dict[str, Any]] = {label: styles[state] for state, label in labels.items() if state in there}
    legend["random prompts, 5 to 95 %"] = {"color": "#D9D9D9", "linestyle": "-", "linewidth": 7}
    detailed = len(adapters) <= DETAILED
    columns = min(2, len(adapters)) if detailed else 1
    rows = math.ceil(len(adapters) / columns) if detailed else 1
    most = min(_ROWS, max(len(adapter["tokens"]["virtual_tokens"]) for adapter in adapters))
    figure = new_figure(title, 0.8 + (rows * (0.5 + 0.19 * most) if detailed else 0.3 + 0.3 * len(adapters)))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    if detailed:
        for axis, adapter in zip(axes, adapters, strict=False):
            _token_rows(axis, adapter, styles, analysis["level"])
        if any(row.get("initial_nearest") for row in tokens):
            legend["at the start"] = {"marker": "D", "color": GREY, "markerfacecolor": "white"}
        for axis in axes[len(adapters) :]:
            axis.set_visible(False)
    else:
        _token_strips(axes[0], adapters, styles, analysis["level"])
    for axis in axes:
        axis.set_xlabel(SCORES[adapters[0]["tokens"]["metric"]])
    # A token of many may lie beyond its band by chance.
    said = "bands are of each virtual token alone, colours by p corrected for all of a prompt's"
    add_legend(figure, legend, loc="outside lower left", ncols=3, title=said, alignment="left")
    return figure


def _token_rows(axis: "Axes", adapter: claims.Part, styles: _Styles, level: float) -> None:
    """A row for each virtual token: what random prompts score, where it started, where it is."""
    tokens = adapter["tokens"]
    bounds = prior_band(tokens)
    order = sorted(range(len(tokens["virtual_tokens"])), key=lambda i: tokens["virtual_tokens"][i]["p_value"])[:_ROWS]
    order.sort()
    axis.barh(
        range(len(order)), bounds[1, order] - bounds[0, order], left=bounds[0, order], height=0.55, color="#D9D9D9",
        edgecolor="#BDBDBD", linewidth=0.7,
    )  # fmt: skip
    for place, index in enumerate(order):
        row = tokens["virtual_tokens"][index]
        if row.get("initial_nearest"):
            start = row["initial_nearest"][0]["score"]
            axis.plot([start, row["score"]], [place, place], color=GREY, linewidth=0.7)
            axis.plot(start, place, marker="D", markersize=4, color=GREY, markerfacecolor="white")
        axis.plot(row["score"], place, markersize=5, linestyle="none", **styles[claims.token_state(row, level)])
    axis.set_yticks(range(len(order)), [str(index) for index in order])
    for place, index in enumerate(order):
        row = tokens["virtual_tokens"][index]
        # Apart from the number, which right-to-left letters would draw in.
        axis.annotate(
            drawable(row["nearest"][0]["text"], 16),
            (0, place),
            xycoords=axis.get_yaxis_transform(),
            xytext=(-24, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold" if row["signal"] else "normal",
            annotation_clip=False,
        )
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    left_out = len(tokens["virtual_tokens"]) - len(order)
    axis.set_title(
        drawable(adapter["name"], 40) + (f" (the {_ROWS} least like chance)" if left_out else ""), loc="left"
    )


def _token_strips(axis: "Axes", adapters: Sequence[claims.Part], styles: _Styles, level: float) -> None:
    """A row for each adapter, in it a dot for each virtual token, on what random prompts score there."""
    for place, adapter in enumerate(adapters):
        rows = adapter["tokens"]["virtual_tokens"]
        low, high = prior_band(adapter["tokens"])
        heights = [place - 0.35 + 0.7 * (row["index"] + 0.5) / len(rows) for row in rows]
        axis.barh(heights, high - low, left=low, height=0.7 / len(rows), color="#D9D9D9", linewidth=0)
        for kind in ("chance", "inherited", "signal"):
            chosen = [row for row in rows if claims.token_state(row, level) == kind]
            where = [heights[row["index"]] for row in chosen]
            axis.plot([row["score"] for row in chosen], where, markersize=3.5, linestyle="none", **styles[kind])
    adapter_rows(axis, adapters)
