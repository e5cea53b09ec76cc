"""Pictures of runs of several priors: learning curves, where prompts lie, how tasks lie among activations."""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import claims
from ..common import sample_rows
from ..compare import Run, grouped
from ..projection import pca, tsne
from .style import COLOURS, GREY, PALE, add_legend, drawable, new_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "o^sDvP*"
_VOCABULARY = 500
_MOST_ROWS = 3


def _palette(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(dict.fromkeys(names))}


# Learning curves.


def curves(runs: Sequence[Run], table: Sequence[Mapping[str, Any]], no_prompt: Mapping[str, float]) -> "Figure":
    """Training batches' likelihood over steps, and the held-out one where it was measured: a panel a task and tuning."""
    tasks, tunings = (list(dict.fromkeys(getattr(run, name) for run in runs)) for name in ("task", "tuning"))
    figure = new_figure(_curves_title(table), 0.5 + 2.3 * len(tasks))
    axes = figure.subplots(len(tasks), len(tunings), squeeze=False, sharex="row")
    palette, several = _palette([run.prior for run in runs]), len({run.seed for run in runs}) > 1
    for (task, tuning), group in grouped(runs, "task", "tuning").items():
        axis = axes[tasks.index(task)][tunings.index(tuning)]
        axis.axhline(no_prompt[task], color=GREY, linestyle=":", linewidth=1)
        for (prior,), same in grouped(group, "prior").items():
            _curve(axis, same, palette[prior])
        axis.set_title(f"{drawable(task, 30)}, {tuning}", loc="left")
    for row in axes:
        row[0].set_ylabel("NLL (nats/token)")
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    for axis in axes.ravel():
        axis.xaxis.get_major_locator().set_params(integer=True)
    entries: dict[str, dict[str, Any]] = {
        prior: {"color": colour, "linestyle": "-"} for prior, colour in palette.items()
    }
    entries |= {
        "training batches": {"color": GREY, "linestyle": "-"},
        **({"range over seeds": {"color": "#D9D9D9", "linestyle": "-", "linewidth": 7}} if several else {}),
        "held-out rows": {"color": GREY, "marker": "o"},
        "no prompt, held-out rows": {"color": GREY, "linestyle": ":"},
    }
    add_legend(figure, entries, loc="outside lower left", ncols=3)
    return figure


def _curve(axis: "Axes", runs: Sequence[Run], colour: str) -> None:
    steps = [step for step, _ in runs[0].curve]
    values = [[run.curve[place][1] for run in runs] for place in range(min(len(run.curve) for run in runs))]
    if values:
        axis.plot(steps[: len(values)], [statistics.fmean(one) for one in values], color=colour, linewidth=1.2)
        if len(runs) > 1:
            low, high = ([pick(one) for one in values] for pick in (min, max))
            axis.fill_between(steps[: len(values)], low, high, color=colour, alpha=0.15, linewidth=0)
    last = steps[-1] if steps else 0
    for step, figures in ((0, [run.initial_results for run in runs]), (last, [run.results for run in runs])):
        if all("nll" in one for one in figures):
            mean = statistics.fmean(one["nll"] for one in figures)
            axis.plot([step], [mean], color=colour, marker="o", markersize=4, clip_on=False)


def _curves_title(table: Sequence[Mapping[str, Any]]) -> str:
    panels: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in table:
        panels.setdefault((row["task"], row["tuning"]), []).append(row)
    best = [min(rows, key=lambda row: row["results"]["nll"]["mean"])["prior"] for rows in panels.values()]
    winner = max(dict.fromkeys(best), key=best.count)
    return f"The prior {winner} ends with the lowest held-out loss in {best.count(winner)} of {len(best)} panels"


# Where prompts lie.


def prompts(runs: Sequence[Run], vocabulary: Tensor, place: Mapping[str, Any], seed: int) -> "Figure":
    """Starts and trained prompts of the first seed at the embedding layer, with the vocabulary: PCA above t-SNE."""
    first = min(run.seed for run in runs)
    shown = [run for run in runs if run.seed == first]
    tunings, tasks = (list(dict.fromkeys(getattr(run, name) for run in shown)) for name in ("tuning", "task"))
    palette = _palette([run.prior for run in runs])
    figure = new_figure(_prompts_title(place), 1.0 + 5.6)
    axes = figure.subplots(2, len(tunings), squeeze=False)
    sample = vocabulary[sample_rows(len(vocabulary), _VOCABULARY, seed, None)]
    for column, tuning in enumerate(tunings):
        own = [run for run in shown if run.tuning == tuning]
        groups = {"vocabulary": sample}
        groups |= {
            f"{kind} {run.name}": of[0] for run in own for kind, of in (("start", run.start), ("end", run.prompt))
        }
        flat, near = pca(groups), tsne(groups, seed=seed)
        for row, found in enumerate((flat, near)):
            _map(axes[row][column], own, found.points, palette, tasks)
        shares = flat.explained_variance or [0.0, 0.0]
        axes[0][column].set_title(f"{tuning}: PCA", loc="left")
        axes[0][column].set_xlabel(f"component 1 ({claims.percent(shares[0])} of variance)")
        axes[0][column].set_ylabel(f"component 2 ({claims.percent(shares[1])})")
        axes[1][column].set_title(f"{tuning}: t-SNE", loc="left")
        axes[1][column].set_xlabel("only neighbours mean something", fontsize=8)
        axes[1][column].set_xticks([])
        axes[1][column].set_yticks([])
    entries: dict[str, dict[str, Any]] = {prior: {"color": colour, "marker": "o"} for prior, colour in palette.items()}
    entries |= {
        f"trained on {task}": {"color": GREY, "marker": mark} for task, mark in zip(tasks, _MARKERS, strict=False)
    }
    entries |= {
        "start": {"color": GREY, "marker": "x"},
        "way from start to end": {"color": GREY, "linestyle": "-", "linewidth": 0.6},
        "vocabulary": {"color": PALE, "marker": "."},
    }
    add_legend(figure, entries, loc="outside lower left", ncols=3)
    return figure


def _map(
    axis: "Axes", runs: Sequence[Run], points: Mapping[str, Tensor], palette: Mapping[str, str], tasks: Sequence[str]
) -> None:
    vocabulary = points["vocabulary"]
    axis.plot(vocabulary[:, 0], vocabulary[:, 1], linestyle="none", marker=".", markersize=2, color=PALE)
    for run in runs:
        start, end = points[f"start {run.name}"], points[f"end {run.name}"]
        colour, mark = palette[run.prior], _MARKERS[tasks.index(run.task) % len(_MARKERS)]
        for one, other in zip(start, end, strict=True):
            axis.plot([one[0], other[0]], [one[1], other[1]], color=colour, linewidth=0.4, alpha=0.35)
        axis.plot(start[:, 0], start[:, 1], linestyle="none", marker="x", markersize=3, color=colour, alpha=0.6)
        axis.plot(end[:, 0], end[:, 1], linestyle="none", marker=mark, markersize=3.5, color=colour, alpha=0.8)


def _prompts_title(place: Mapping[str, Any]) -> str:
    if not place:
        return "Where prompts start and where training takes them"
    said = [f"{claims.percent(one['nearest_start'])} ({tuning})" for tuning, one in place.items()]
    return f"Trained prompts that lie nearer to their own start than to any other prior's: {', '.join(said)}"


# Tasks among activations.


def tasks(
    states: Mapping[str, Mapping[int, Mapping[str, Tensor]]],
    found: Sequence[Mapping[str, Any]],
    method: str,
    seed: int,
) -> "Figure | None":
    """Rows of each task by layer, without a prompt and with one of each task before all rows."""
    if not states:
        return None
    conditions = list(states)[:_MOST_ROWS]
    layers = list(states[conditions[0]])
    names = list(states[conditions[0]][layers[0]])
    figure = new_figure(_tasks_title(found), 0.4 + 2.6 * len(conditions))
    axes = figure.subplots(len(conditions), len(layers), squeeze=False)
    looks = {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 3,
            "alpha": 0.7,
        }
        for i, name in enumerate(names)
    }
    for row, condition in zip(axes, conditions, strict=True):
        for axis, layer in zip(row, layers, strict=True):
            parts = states[condition][layer]
            placed = pca(parts).points if method == "pca" else tsne(parts, seed=seed).points
            for name in names:
                axis.plot(placed[name][:, 0], placed[name][:, 1], linestyle="none", **looks[name])
            scores = [one for one in found if (one["condition"], one["layer"]) == (condition, layer)]
            probes, silhouettes = (sorted(one[name] for one in scores) for name in ("probe_accuracy", "silhouette"))
            axis.set_title(
                f"layer {layer}: probe {_span(list(map(claims.percent, probes)))},\n"
                f"silhouette {_span(list(map(claims.decimals, silhouettes)))}",
                loc="left",
                fontsize=8,
            )
            axis.tick_params(labelsize=7)
            if method == "tsne":
                axis.set_xticks([])
                axis.set_yticks([])
        said = "no prompt" if condition == "no prompt" else "prompt of\n" + drawable(condition, 30)
        row[0].set_ylabel(f"{said}\nPCA component 2" if method == "pca" else said, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("PCA component 1" if method == "pca" else "t-SNE: only neighbours mean something", fontsize=8)
    add_legend(figure, looks, loc="outside lower left", ncols=6)
    return figure


def _tasks_title(found: Sequence[Mapping[str, Any]]) -> str:
    accuracies, silhouettes = (sorted(one[name] for one in found) for name in ("probe_accuracy", "silhouette"))
    return (
        f"A linear probe tells tasks apart in {_span(list(map(claims.percent, accuracies)))} of rows cut to equal lengths; "
        f"as clusters their silhouette is {_span(list(map(claims.decimals, silhouettes)))}"
    )


def _span(values: Sequence[str]) -> str:
    """The first and the last, or the one that they are."""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
