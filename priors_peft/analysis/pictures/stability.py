"""Picture of several runs of a task: distances between their prompts, loss on the lines between them."""

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import COLOURS, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GROUPS = 6


def draw(analysis: claims.Part) -> "Figure | None":
    groups = (analysis.get("stability") or {}).get("groups") or []
    title = claims.stability_title(groups)
    if title is None:
        return None
    shown = groups[:_GROUPS]
    lines = any(group.get("lines") for group in shown)
    figure = new_figure(title, 0.2 + 2.3 * len(shown))
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, group in zip(axes, shown, strict=True):
        raw, matched = array(group["raw_distances"]), array(group["matched_distances"])
        name = f"{drawable(str(group['task'] or 'runs'), 18)}: distances"
        image: Any = None
        for axis, values, what in ((row[0], raw, name), (row[1], matched, "after matching tokens")):
            # Square cells would lay labels over one another: the layout does not settle around them.
            most = max(np.nanmax(raw), 1e-9)
            image = heat_map(axis, values, vmin=0, vmax=most, cmap="cividis", aspect="auto")
            axis.set_title(what, loc="left")
            numbers = range(1, len(values) + 1)
            axis.set_xticks(range(len(values)), [str(number) for number in numbers])
            axis.set_yticks(
                range(len(values)),
                [f"{drawable(name, 12)}  {i}" for i, name in zip(numbers, group["adapters"], strict=True)],
            )
        for axis in row[:2]:
            axis.set_xlabel("run")
        row[1].set_yticklabels([str(number) for number in range(1, len(matched) + 1)])
        figure.colorbar(image, ax=row[1], label="Frobenius norm")
        row[2].set_visible(lines)
        if lines:
            _lines(row[2], group)
    return figure


def heat_map(axis: "Axes", values: np.ndarray, **settings: Any) -> Any:
    """A matrix as an image, with its figures in the cells where they fit."""
    image = axis.imshow(values, **settings)
    axis.grid(visible=False)
    if values.size <= 100:
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                ink = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
                axis.text(j, i, claims.number(float(value), 2), ha="center", va="center", fontsize=7, color=ink)
    return image


def _lines(axis: "Axes", group: claims.Part) -> None:
    for index, line in enumerate(group.get("lines") or []):
        pair = " to ".join(str(group["adapters"].index(name) + 1) for name in line["pair"])
        axis.plot(line["t"], array(line["nll"]), color=COLOURS[index % len(COLOURS)], linewidth=1.3, label=pair)
    if len(group.get("lines") or []) <= 6:
        axis.legend(
            fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.25), handlelength=1, columnspacing=1
        )
    axis.set_xlabel("place between two runs")
    axis.set_ylabel("nats per token")
    axis.set_title("loss on the straight lines", loc="left")
