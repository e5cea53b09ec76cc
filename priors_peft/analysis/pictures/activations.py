"""Picture of tasks in activation space, with their separability as a number."""

from typing import TYPE_CHECKING

import numpy as np

from .. import claims
from .style import COLOURS, add_legend, array, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYERS = 4


def draw(analysis: claims.Part) -> "Figure | None":
    title = claims.activations_title(analysis.get("activations") or {"layers": []})
    if title is None:
        return None
    found = analysis["activations"]["layers"]
    layers = sorted({layer["layer"] for layer in found})
    chosen = [layers[round(place)] for place in np.linspace(0, len(layers) - 1, min(_LAYERS, len(layers)))]
    kinds = [kind for kind in (True, False) if any(bool(layer["with_prompt"]) == kind for layer in found)]
    figure = new_figure(title, 0.4 + 2.3 * len(kinds))
    axes = figure.subplots(len(kinds), len(chosen), squeeze=False)
    names = list(dict.fromkeys(group["name"] for layer in found for group in layer["groups"]))
    markers = "os^DvP*"
    looks = {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": markers[i % len(markers)], "markersize": 3, "alpha": 0.7}
        for i, name in enumerate(names)
    }
    for axis in axes.ravel():
        axis.set_visible(False)
    for layer in found:
        if layer["layer"] not in chosen:
            continue
        axis = axes[kinds.index(bool(layer["with_prompt"])), chosen.index(layer["layer"])]
        axis.set_visible(True)
        for group in layer["groups"]:
            points = array(group["points"]).reshape(-1, 2)
            axis.plot(points[:, 0], points[:, 1], linestyle="none", **looks[group["name"]])
        axis.set_title(
            f"layer {layer['layer']}, {'with' if layer['with_prompt'] else 'without'} prompt\n"
            f"probe {claims.percent(layer['probe_accuracy'])}, silhouette {claims.number(layer['silhouette'], 2)}",
            loc="left",
            fontsize=8,
        )
        axis.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("PCA component 1")
    for axis in axes[:, 0]:
        axis.set_ylabel("PCA component 2")
    add_legend(figure, looks, loc="outside lower left", ncols=6)
    return figure
