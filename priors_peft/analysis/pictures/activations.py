"""Picture of tasks in activation space, with their separability as a number."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import COLOURS, add_legend, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Most panels in a row, and most rows.
_LAYERS, _CONDITIONS = 4, 5
_MARKERS = "os^DvP*"


def draw(analysis: claims.Part) -> "Figure | None":
    title = claims.activations_title(analysis.get("activations") or {"layers": []})
    if title is None:
        return None
    measured = list(conditions(analysis["activations"]).items())
    found = measured[:_CONDITIONS]
    if len(measured) > len(found):
        title += f" (drawn: {len(found) - 1} of {len(measured) - 1} prompts)"
    numbers = sorted({layer["layer"] for _, layers in found for layer in layers})
    chosen = [numbers[round(place)] for place in np.linspace(0, len(numbers) - 1, min(_LAYERS, len(numbers)))]
    figure = new_figure(title, 0.4 + (2.4 if len(found) < 4 else 1.9) * len(found))
    axes = figure.subplots(len(found), len(chosen), squeeze=False)
    names = list(dict.fromkeys(group["name"] for _, layers in found for layer in layers for group in layer["groups"]))
    looks = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 3,
            "alpha": 0.7,
        }
        for i, name in enumerate(names)
    }
    for axis in axes.ravel():
        axis.set_visible(False)
    for row, (condition, layers) in zip(axes, found, strict=True):
        for layer in layers:
            if layer["layer"] in chosen:
                _panel(row[chosen.index(layer["layer"])], layer, looks)
        row[0].set_ylabel(f"{drawable(condition, 24)}\nPCA component 2")
    for axis in axes[-1]:
        axis.set_xlabel("PCA component 1")
    add_legend(figure, looks, loc="outside lower left", ncols=6)
    return figure


def conditions(activations: claims.Part) -> dict[str, list[claims.Part]]:
    """Layers by what stood before the rows, no prompt first: `"without prompt"`, or the adapter's name."""
    found: dict[str, list[claims.Part]] = {}
    for layer in sorted(activations["layers"], key=lambda layer: (bool(layer["with_prompt"]), layer["layer"])):
        name = (layer.get("adapter") or "with prompt") if layer["with_prompt"] else "without prompt"
        found.setdefault(name, []).append(layer)
    return found


def _panel(axis: "Axes", layer: claims.Part, looks: Mapping[str, Mapping[str, Any]]) -> None:
    axis.set_visible(True)
    for group in layer["groups"]:
        points = array(group["points"]).reshape(-1, 2)
        axis.plot(points[:, 0], points[:, 1], linestyle="none", **looks[group["name"]])
    axis.set_title(
        f"layer {layer['layer']}\nprobe {claims.percent(layer['probe_accuracy'])}, "
        f"silhouette {claims.decimals(layer['silhouette'])}",
        loc="left",
        fontsize=8,
    )
    axis.tick_params(labelsize=7)
