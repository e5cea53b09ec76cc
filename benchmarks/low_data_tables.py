"""Tables and picture of `low_data.py`'s lines."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priors_peft.commands.evaluate import markdown_table
from priors_peft.files import atomic_path


def table(lines: list[dict[str, Any]], methods: Sequence[str]) -> str:
    """Mean and standard deviation over seeds, a row a task, size and method."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["task"], line["size"], line["method"]].append(line)
    rows = []
    for key in sorted(groups, key=lambda key: (key[0], key[1], methods.index(key[2]))):
        group = groups[key]
        names = ("nll", "nll_alone", "ece", "ece_chance", "cpu_seconds")
        figures = [spread([line[name] for line in group if name in line]) for name in names]
        rows.append([*map(str, key), str(len(group)), *figures])
    head = ["task", "rows", "method", "seeds", "NLL (nats/token)", "of one prompt", "ECE", "by chance", "CPU seconds"]
    return markdown_table(head, rows)


def paired(lines: list[dict[str, Any]], method: str, against: str = "stock tuned") -> str:
    """What `method` gains over another on the same rows and seeds: mean ± standard error over seeds."""
    found = {(line["task"], line["size"], line["seed"], line["method"]): line for line in lines}
    rows = []
    for task, size in dict.fromkeys((line["task"], line["size"]) for line in lines):
        seeds = [key[2] for key in found if key[:2] == (task, size) and key[3] == method]
        pairs = [
            (found[task, size, seed, method], found[task, size, seed, against])
            for seed in seeds
            if (task, size, seed, against) in found
        ]
        if len(pairs) < 2:
            continue
        gains = [
            [theirs["nll"] - ours[name] for ours, theirs in pairs if name in ours] for name in ("nll", "nll_alone")
        ]
        ece, seconds = (
            statistics.mean(ours[name] for ours, _ in pairs) / statistics.mean(theirs[name] for _, theirs in pairs)
            for name in ("ece", "cpu_seconds")
        )
        told = [
            f"{statistics.mean(one):+.3f} ± {statistics.stdev(one) / len(one) ** 0.5:.3f}" if len(one) > 1 else ""
            for one in gains
        ]
        rows.append([task, str(size), str(len(pairs)), *told, f"{ece:.2f}", f"{seconds:.2f}"])
    if not rows:
        return ""
    gain = f"NLL of {against} − {method} (nats/token)"
    head = ["task", "rows", "seeds", gain, "− its one prompt", "ECE, ratio", "CPU time, ratio"]
    return markdown_table(head, rows)


# Method: its colour and mark in the picture.
STYLES = {
    "stock default": ("#999999", "v"),
    "stock tuned": ("#000000", "s"),
    "map": ("#e69f00", "^"),
    "variational": ("#0072b2", "o"),
    "its one prompt": ("#0072b2", "x"),
    "one Gaussian": ("#8fbfe0", "o"),
    "sghmc": ("#009e73", "D"),
    "laplace": ("#cc79a7", "P"),
    "text": ("#d55e00", "X"),
    "empirical": ("#56b4e9", "*"),
}


def draw(lines: list[dict[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Held-out likelihood and calibration by number of training rows, a column a task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [line for line in lines if line["method"] == "variational" and "nll_alone" in line]
    named = {"method": "its one prompt"}
    lines = lines + [line | named | {"nll": line["nll_alone"], "ece": line["ece_alone"]} for line in ours]
    tasks = [task for task in tasks if any(line["task"] == task for line in lines)]
    figure, axes = plt.subplots(2, len(tasks), figsize=(1 + 3.4 * len(tasks), 6), sharex=True, squeeze=False)
    sizes = sorted({line["size"] for line in lines})
    apart = 1 + 0.012 * math.log(4 * sizes[-1] / sizes[0])
    labels = {"nll": "held-out NLL\n(nats per answer token)", "ece": "expected\ncalibration error"}
    for column, task in enumerate(tasks):
        own = [line for line in lines if line["task"] == task]
        for axis, (figure_name, label) in zip(axes[:, column], labels.items(), strict=True):
            for offset, (method, (color, marker)) in enumerate(STYLES.items()):
                groups = [
                    [line[figure_name] for line in own if (line["method"], line["size"]) == (method, size)]
                    for size in sizes
                ]
                known = [(size, group) for size, group in zip(sizes, groups, strict=True) if group]
                if known:
                    axis.errorbar(
                        [size * apart ** (offset - 2.5) for size, _ in known],
                        [statistics.mean(group) for _, group in known],
                        [statistics.stdev(group) if len(group) > 1 else 0 for _, group in known],
                        color=color,
                        marker=marker,
                        capsize=2,
                        lw=1.2,
                        ls=":" if method == "its one prompt" else "-",
                        ms=5,
                        label=method,
                    )
            bare = [line["nll"] for line in own if line["method"] == "none"]
            if bare and figure_name == "nll":
                axis.text(0.98, 0.96, f"no prompt: {bare[0]:.2f}", transform=axis.transAxes, ha="right", va="top")
            axis.set_xscale("log")
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_xlim(sizes[0] / apart**6, sizes[-1] * apart**6)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel(label)
        axes[0, column].set_title(task)
        axes[1, column].set_xlabel("training rows")
        axes[1, column].set_ylim(bottom=0)
    handles = {
        text: handle for axis in axes.flat for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    title = "mean and standard deviation over seeds; less is better"
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False, title=title)
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
