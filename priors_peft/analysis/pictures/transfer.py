"""Picture of transfer: what each prompt adds on each task, and which similarity foretells it."""

from typing import TYPE_CHECKING

import numpy as np

from .. import claims
from .stability import heat_map
from .style import COLOURS, GREY, array, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(analysis: claims.Part) -> "Figure | None":
    from matplotlib.patches import Rectangle

    transfer = analysis.get("transfer")
    if not transfer:
        return None
    gains = array(claims.gains(transfer))
    figure = new_figure(claims.transfer_title(transfer), 1.3 + 0.32 * max(len(gains), 6))
    correlations = {
        name: found for name, found in (transfer.get("correlations") or {}).items() if found["rho"] is not None
    }
    axes = figure.subplots(1, 1 + bool(correlations), squeeze=False, width_ratios=[1.5, 1] if correlations else None)[
        0
    ]
    most = float(np.nanmax(np.abs(gains)))
    image = heat_map(axes[0], gains, vmin=-(most or 1), vmax=most or 1, cmap="PuOr", aspect="auto")
    for row, column in own_cells(transfer):
        axes[0].add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5, clip_on=False)
        )
    turned = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        if max(map(len, transfer["tasks"])) * len(transfer["tasks"]) > 30
        else {}
    )
    axes[0].set_xticks(range(len(transfer["tasks"])), [drawable(task, 18) for task in transfer["tasks"]], **turned)
    axes[0].set_yticks(range(len(gains)), [drawable(name, 18) for name in transfer["prompts"]])
    axes[0].set_xlabel("measured on (framed: trained on)")
    axes[0].set_ylabel("prompt")
    axes[0].set_title(f"{drawable(transfer['metric'].replace('_', ' '), 32)},\nbetter than no prompt by", loc="left")
    if most:  # else any scale would do
        figure.colorbar(image, ax=axes[0])
    if correlations:
        _forest(axes[1], correlations)
    return figure


def own_cells(transfer: claims.Part) -> list[tuple[int, int]]:
    """Row and column of each prompt on its own task, where it is known and among the tasks."""
    return [(row, column) for row, column in enumerate(transfer.get("own") or []) if column is not None]


def _forest(axis: "Axes", correlations: claims.Part) -> None:
    """A row for each similarity: its correlation with transfer and the interval."""
    for place, found in enumerate(correlations.values()):
        low, high = array(found["interval"])
        axis.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
        axis.plot(found["rho"], place, "o", color=COLOURS[0], markersize=6)
        axis.annotate(
            f"p = {claims.number(found['p_value'], 2)}", (found["rho"], place), xytext=(0, 7),
            textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
    axis.axvline(0, color=GREY, linewidth=0.7)
    axis.set_yticks(range(len(correlations)), [drawable(name, 20) for name in correlations])
    axis.set_ylim(len(correlations) - 0.4, -0.6)
    axis.set_xlim(-1.05, 1.05)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("rank correlation with gain\n(line: 95 % interval)")
    axis.set_title("does likeness predict gain?", loc="left")
