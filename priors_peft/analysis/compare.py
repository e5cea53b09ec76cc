"""Runs of several priors held against one another: a table, paired differences, and measures of where prompts end up.

An arm is what is compared: all settings but the task and the seed. Runs of one arm and one task differ by their seed
alone; runs of one task and one seed saw the same data in the same order, whatever their arm.
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..names import unknown
from ..priors import Prior
from .activations import separability


FOLDS = 5


@dataclass(eq=False)
class Run:
    """One trained prompt and what came of it.

    Attributes:
        name: Unique among the runs.
        data: What it was trained and evaluated on: `task`, and what else must be the same for figures to compare.
        seed: Of the start and of the order of the data.
        settings: All others: `tuning`, `layers`, `prior` and the rest.
        results: Figures on the evaluation rows; `nll` is in nats per answer token.
        initial_results: The same before training, where that was measured.
        curve: Steps and the training batches' NLL since the one before.
        prompt: θ, shape `[S, P, d]`.
        start: θ before training, the same shape.
        priors: One for each of the S layers.
        task: The task's name among the runs, from `name_runs`.
        tuning: What is tuned, likewise.
        prior: The prior's name, likewise.
    """

    name: str
    data: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    results: dict[str, float]
    initial_results: dict[str, float]
    curve: list[tuple[int, float]]
    prompt: Tensor
    start: Tensor
    priors: list[Prior] = field(repr=False)
    task: str = ""
    tuning: str = ""
    prior: str = ""


# Names.


def name_runs(runs: Sequence[Run]) -> None:
    """Give each run the names of its task, its tuning and its prior: short, and different where the settings are.

    Raises:
        ValueError: Two runs are of one task, arm and seed, or there are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(
            f"runs must be at least 2 to be compared, got {len(runs)}: add a run of another prior or seed"
        )
    tasks = _names([run.data for run in runs], [str(run.data["task"]) for run in runs])
    # A setting that goes with the task, such as its number of steps, tells no arms apart.
    varying = {
        key
        for task in set(tasks)
        for same in [[run.settings for run, of in zip(runs, tasks, strict=True) if of == task]]
        for key in set().union(*same)
        if len({_text(settings.get(key)) for settings in same}) > 1
    }
    arms = [{key: run.settings.get(key) for key in sorted(varying)} for run in runs]
    named = _names(arms, [f"{_tuning(run.settings)}\n{run.settings['prior']}" for run in runs])
    for run, task, arm in zip(runs, tasks, named, strict=True):
        run.task, (run.tuning, run.prior) = task, arm.split("\n", 1)
    seen: dict[tuple[str, ...], Run] = {}
    for run in runs:
        key = (run.task, run.tuning, run.prior, str(run.seed))
        if key in seen:
            raise ValueError(
                f"runs must differ in task, settings or seed, got {seen[key].name} and {run.name}, both {', '.join(key)}"
            )
        seen[key] = run


def _tuning(settings: Mapping[str, Any]) -> str:
    layers = settings.get("layers")
    if settings["tuning"] == "soft":
        return "soft"
    return "deep" if layers in (None, "all") else f"deep {','.join(map(str, layers))}"


def _names(groups: Sequence[Mapping[str, Any]], short: Sequence[str]) -> list[str]:
    """A name of each group: the short one, and what differs where different groups would share it."""
    names = []
    for group, name in zip(groups, short, strict=True):
        alike = [other for other, one in zip(groups, short, strict=True) if one == name]
        differing = sorted(key for key in group if len({_text(other.get(key)) for other in alike}) > 1)
        names.append(" ".join(filter(None, [name, *(_said(key, group[key]) for key in differing)])))
    return names


def _said(key: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(_said(str(name), one) for name, one in value.items())
    return "" if value is None else f"{key}={value}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


# The table.


def baseline_of(runs: Sequence[Run], given: str | None = None) -> str:
    """The prior that differences are taken from: the one given, or `gaussian`, or without it the first run's.

    Raises:
        ValueError: No run has the given name.
    """
    known = [run.prior for run in runs]
    if given is None:
        return "gaussian" if "gaussian" in known else known[0]
    if given not in known:
        raise ValueError(f"baseline (--baseline) must be {unknown(given, sorted(set(known)))}")
    return given


def table(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of every figure, and paired differences of the NLL from a baseline.

    Args:
        runs: With names.
        baseline: A prior's name. An arm is held against the baseline's run of the same task, tuning and seed.

    Returns:
        For each task, tuning and prior, in the runs' order: `seeds`, `results` and `initial_results` (each figure's
        `mean` and `std`), and `difference`: `mean`, its standard error `se` and the number of pairs `n`, or None for the
        baseline itself. Where there is one seed, `std` and `se` are None.

    Raises:
        ValueError: No run has the baseline's name.
    """
    baseline = baseline_of(runs, baseline)
    known = {(run.task, run.tuning, run.prior, run.seed): run for run in runs}
    rows = []
    for (task, tuning, prior), group in grouped(runs, "task", "tuning", "prior").items():
        pairs = {
            (task, run.seed): run.results["nll"] - known[task, tuning, baseline, run.seed].results["nll"]
            for run in group
            if (task, tuning, baseline, run.seed) in known
        }
        rows.append(
            {
                "task": task,
                "tuning": tuning,
                "prior": prior,
                "seeds": [run.seed for run in group],
                "results": _summaries([run.results for run in group]),
                "initial_results": _summaries([run.initial_results for run in group]),
                "difference": None if prior == baseline else mean_and_error(pairs),
            }
        )
    return rows


def grouped(runs: Iterable[Run], *names: str) -> dict[tuple[str, ...], list[Run]]:
    """Runs by some of their attributes, in their order."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def mean_and_error(values: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """Mean over tasks, its standard error over seeds and their count: how much more tasks differ than seeds is no error.

    Where each seed has each task these are of the seeds' means; None where there are too few for them.

    Args:
        values: By task and seed; a seed may lack tasks. With a task of one seed there is no error.
    """
    by_task: dict[str, dict[int, float]] = {}
    for (task, seed), value in values.items():
        by_task.setdefault(task, {})[seed] = value
    means = {task: statistics.fmean(of_task.values()) for task, of_task in by_task.items()}
    # How far each seed moves the mean, over all its tasks, as their noise may be shared.
    shares: dict[int, float] = dict.fromkeys((seed for _, seed in values), 0.0)
    for (task, seed), value in values.items():
        count = len(by_task[task])
        shares[seed] += (value - means[task]) / math.sqrt(count * max(1, count - 1)) / len(means)
    told = min(map(len, by_task.values()), default=0) > 1
    return {
        "mean": statistics.fmean(means.values()) if means else None,
        "se": math.hypot(*shares.values()) if told else None,
        "n": len(shares),
    }


def _summaries(figures: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    shared = [key for key in figures[0] if all(key in other for other in figures)]
    return {
        key: {
            "mean": statistics.fmean(one[key] for one in figures),
            "std": statistics.stdev(one[key] for one in figures) if len(figures) > 1 else None,
        }
        for key in shared
    }


# Tasks among activations.


def clusters(states: Mapping[str, Mapping[int, Mapping[str, Tensor]]], seed: int = 0) -> list[dict[str, Any]]:
    """How well the states of each two tasks can be told apart, see `activations.separability`.

    Args:
        states: Points `[n, d]` by condition (what stood before the rows), layer and task.
        seed: Of the folds.

    Returns:
        For each condition, layer and pair of tasks `silhouette`, `probe_accuracy` beside `chance`, and the `counts`.
    """
    found = []
    for condition, layers in states.items():
        for layer, parts in layers.items():
            for pair in itertools.combinations(parts, 2):
                labels = [task for task in pair for _ in parts[task]]
                result = separability(torch.cat([parts[task] for task in pair]), labels, FOLDS, seed)
                found.append({"condition": condition, "layer": layer, "tasks": list(pair)} | result.to_dict())
    return found
