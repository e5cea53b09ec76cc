"""Draws docs/flow.png: `python docs/flow.py`."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


PRIOR, PARAMETER, FROZEN, DATA, RESULT = "#fde2b3", "#f4a582", "#d9e6f2", "#e8e8e8", "#cfe8cf"


def box(axes, x, y, width, height, title, text, color):
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", fc=color, ec="#444")
    )
    axes.text(x + width / 2, y + height - 0.28, title, ha="center", va="center", fontsize=11, weight="bold")
    axes.text(x + width / 2, y + (height - 0.42) / 2, text, ha="center", va="center", fontsize=9.5, linespacing=1.35)


def arrow(axes, start, end, text="", at=(0, 0), **style):
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": "#444", "lw": 1.4} | style
    axes.add_patch(FancyArrowPatch(start, end, **style))
    if text:
        axes.text(*at, text, fontsize=9, color="#333", ha="center", va="center")


figure, axes = plt.subplots(figsize=(12.5, 6.6))
axes.set_xlim(0, 12.5)
axes.set_ylim(0, 6.6)
axes.axis("off")

box(axes, 0.2, 4.9, 2.5, 1.3, "reference", "vocabulary rows,\nor a layer's activations", DATA)
box(axes, 3.5, 4.9, 2.5, 1.3, "prior  p(θ)", "location µ, scale A\nfitted once, frozen", PRIOR)
box(axes, 3.5, 2.65, 2.5, 1.3, "prompt  θ = µ + A z", "z: the one trained\nparameter  [S, P, d]", PARAMETER)
box(axes, 3.5, 0.4, 2.5, 1.3, "batch", "input_ids, labels\n[B, L]", DATA)
box(
    axes,
    6.9,
    1.3,
    2.5,
    1.9,
    "one sequence",
    "prompt, once; what all\nrows begin with, once;\nrows unpadded: each sees\nthese and itself",
    FROZEN,
)
box(axes, 9.95, 1.6, 2.4, 1.3, "LM head", "supervised positions\nonly  [N, V]", FROZEN)
box(axes, 9.95, 4.9, 2.4, 1.3, "objective", "mean NLL\n− (weight / N) · log p(θ)", RESULT)

arrow(axes, (2.75, 5.55), (3.45, 5.55), "fit", (3.1, 5.75))
arrow(axes, (4.75, 4.85), (4.75, 4.0), "draw the start", (5.5, 4.42))
arrow(axes, (6.05, 3.1), (6.85, 2.75))
arrow(axes, (6.05, 1.15), (6.85, 1.7))
arrow(axes, (9.45, 2.25), (9.9, 2.25))
arrow(axes, (11.15, 2.95), (11.15, 4.85), "NLL", (11.45, 3.9))
arrow(axes, (6.05, 5.75), (9.9, 5.75), "log p(θ), in nats", (8.0, 5.95))
arrow(axes, (9.9, 5.2), (6.05, 3.7), color="#b2182b", connectionstyle="arc3,rad=0.03", linestyle="--")
axes.text(8.4, 4.12, "gradient, to z alone", fontsize=9, color="#b2182b", ha="center")
figure.savefig(Path(__file__).parent / "flow.png", dpi=110, bbox_inches="tight")
