"""Picture of how wide posteriors are beside their priors, and of what their draws agree on, token by token."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .faithfulness import nearest_word
from .style import COLOURS, DETAILED, GREY, adapter_rows, add_legend, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = "standard deviation (1: the prior's)"
_AGREED = "draws with the prompt's nearest token"
# Most bars that their words fit under.
_NAMED = 24


def draw(analysis: claims.Part) -> "Figure | None":
    adapters = [adapter for adapter in analysis["adapters"] if adapter.get("posterior")]
    title = claims.posterior_title(adapters)
    if title is None:
        return None
    deep = any(len(adapter["posterior"]["layers"]) > 1 for adapter in adapters)
    title += " (drawn: embedding layer)" * deep
    if len(adapters) > DETAILED:
        figure = new_figure(title, 0.9 + 0.32 * len(adapters))
        left, right = figure.subplots(1, 2)
        _strips(left, adapters, [adapter["posterior"]["layers"][0]["deviation"] for adapter in adapters], _WIDTH)
        _strips(right, adapters, [adapter["posterior"]["agreement"] for adapter in adapters], _AGREED)
        left.axvline(1, color=GREY, linestyle="--", linewidth=1)
        right.set_yticklabels([])
    else:
        figure = new_figure(title, 0.4 + 2.6 * len(adapters))
        axes = figure.subplots(len(adapters), 2, squeeze=False)
        for row, adapter in zip(axes, adapters, strict=True):
            _widths(row[0], adapter)
            _agreement(row[1], adapter)
    entries: dict[str, dict[str, Any]] = {"the prior": {"color": GREY, "linestyle": "--"}}
    if len(adapters) <= DETAILED and any(adapter["posterior"]["initial_deviation"] for adapter in adapters):
        entries["when training began"] = {"color": COLOURS[1], "linestyle": ":"}
    add_legend(figure, entries, loc="outside lower left", ncols=2)
    return figure


def _widths(axis: "Axes", adapter: claims.Part) -> None:
    """How wide the posterior of each virtual token is, under the prior's width."""
    found = adapter["posterior"]
    _bars(axis, adapter, array(found["layers"][0]["deviation"]))
    axis.axhline(1, color=GREY, linestyle="--", linewidth=1)
    if found["initial_deviation"]:
        axis.axhline(found["initial_deviation"], color=COLOURS[1], linestyle=":", linewidth=1.3)
    axis.set_ylim(0, max(1.1, 1.1 * axis.get_ylim()[1]))
    axis.set_ylabel("posterior / prior std")
    axis.set_title(f"{drawable(adapter['name'], 30)}: width of the posterior", loc="left")


def _agreement(axis: "Axes", adapter: claims.Part) -> None:
    found = adapter["posterior"]
    _bars(axis, adapter, array(found["agreement"]))
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of draws")
    axis.set_title(f"same nearest token as the mean, {claims.plural(found['num_draws'], 'draw')}", loc="left")


def _bars(axis: "Axes", adapter: claims.Part, heights: np.ndarray) -> None:
    places = range(len(heights))
    axis.bar(places, heights, color=COLOURS[0])
    if len(heights) <= _NAMED:
        words = [drawable(nearest_word(adapter, place), 12) or str(place) for place in places]
        axis.set_xticks(places, words, rotation=90, fontsize=7)
    axis.set_xlabel("virtual token, by its nearest token" if len(heights) <= _NAMED else "virtual token")
    axis.grid(axis="x", visible=False)


def _strips(axis: "Axes", adapters: Sequence[claims.Part], values: Sequence[Any], label: str) -> None:
    """A row for each adapter, a dot for each virtual token."""
    for place, found in enumerate(values):
        heights = place - 0.3 + 0.6 * np.arange(len(found)) / max(1, len(found) - 1)
        axis.plot(found, heights, ".", color=COLOURS[0], markersize=4)
    adapter_rows(axis, adapters)
    axis.set_xlim(left=0)
    axis.set_xlabel(label)
