"""Picture of shape and place over training, with the prior's band."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims
from .style import DETAILED, add_legend, array, colours, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Measures in the order they are drawn, with what their axes say.
MEASURES = {
    "effective_rank": "effective rank (directions)",
    "mean_pairwise_cosine": "mean pairwise cosine",
    "nearest_cosine": "cosine to nearest token",
    "norm": "length",
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
    names = [name for name in MEASURES if any(name in one["measures"] for one in series.values())]
    figure = new_figure(title, 2.1 * math.ceil((len(names) + 1) / 3))
    axes = figure.subplots(math.ceil((len(names) + 1) / 3), 3, squeeze=False).ravel()
    palette = colours(adapters)
    for axis, name in zip(axes, names, strict=False):
        measured = {key: one["measures"][name] for key, one in series.items() if name in one["measures"]}
        bands = {key: array(measure["band"]) for key, measure in measured.items()}
        alike = np.ptp(np.stack(list(bands.values())), axis=0).max() < 1e-9
        if alike or len(bands) > DETAILED:
            together = np.stack(list(bands.values()))
            axis.axhspan(together[:, 0].min(), together[:, 1].max(), color="#D9D9D9", alpha=0.6, linewidth=0)
        for key, measure in measured.items():
            if not alike and len(bands) <= DETAILED:
                axis.axhspan(*bands[key], color=palette[key][0], alpha=0.15, linewidth=0)
            steps = series[key]["steps"]
            marker = "o" if len(steps) == 1 else ""
            axis.plot(steps, array(measure["values"]), color=palette[key][0], linewidth=1.3, marker=marker)
        axis.set_title(MEASURES[name], loc="left")
        axis.set_xlabel("training step")
    for axis in axes[len(names) :]:
        axis.axis("off")
    entries: dict[str, dict[str, Any]] = {key: {"color": colour, "linestyle": "-"} for colour, key in palette.values()}
    entries["random prompts, 5 to 95 %"] = {"color": "#D9D9D9", "linestyle": "-", "linewidth": 7}
    add_legend(axes[len(names)], entries, loc="upper left", fontsize=8 if len(entries) < 9 else 6)
    return figure
