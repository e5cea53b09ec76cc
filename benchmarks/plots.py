"""Draws the pictures of docs/benchmarks.md from what `training_step.py --sweep` measured.

python benchmarks/plots.py --input outputs/training_step.jsonl
"""

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=Path("outputs/training_step.jsonl"))
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks/ratio.png"))
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.input.read_text().splitlines()]
    cases = {tuple(line["case"][:5]): line for line in lines if len(line["case"]) > 5}
    swept = {
        case: line
        for case, line in cases.items()
        if case[0].endswith("smollm2-135m") and case[1] == 8 and case[4] == 4
    }
    by_prompt = sorted((case[3], line) for case, line in swept.items() if case[2] == 64)
    by_text = sorted((case[2], line) for case, line in swept.items() if case[3] == 20)
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    panels = (
        (axes[0], by_prompt, "virtual tokens (text: 64 tokens a row)"),
        (axes[1], by_text, "text tokens a row (20 virtual tokens)"),
    )
    for axis, points, label in panels:
        across = [point for point, _ in points]
        median, least, most = ([line[key] for _, line in points] for key in ("ratio", "least", "most"))
        axis.fill_between(across, least, most, color="#0072b2", alpha=0.2, lw=0, label="range of the pairs")
        axis.plot(across, median, "o-", color="#0072b2", label="median")
        axis.axhline(1, color="#444", lw=1, ls="--")
        axis.annotate("stock PEFT", (across[-1], 1), xytext=(0, 4), textcoords="offset points", fontsize=9, ha="right")
        axis.set_xscale("log")
        axis.set_xticks(across, [str(point) for point in across])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("stock PEFT's time / ours")
    axes[0].legend(frameon=False, loc="upper left")
    figure.suptitle(
        "A training step against stock PEFT, SmolLM2-135M, 8 rows of equal length, 4 answer tokens each\n"
        "The longer the prompt and the shorter the text, the more is saved",
        fontsize=10.5,
    )
    figure.tight_layout()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
