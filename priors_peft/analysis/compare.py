"""Runs of several priors held against one another: a table, paired differences, and measures of where prompts end up.

An arm is what is compared: all settings but the task and the seed. Runs of one arm and one task differ by their seed
alone; runs of one task and one seed saw the same data in the same order, whatever their arm.
"""

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..priors import Prior
from .activations import separability
from .discrepancy import median_distance, squared_mmd


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
    priors = list(dict.fromkeys(run.prior for run in runs))
    if baseline not in priors:
        raise ValueError(f"baseline must be one of {', '.join(priors)}, got {baseline!r}")
    known = {(run.task, run.tuning, run.prior, run.seed): run for run in runs}
    rows = []
    for (task, tuning, prior), group in grouped(runs, "task", "tuning", "prior").items():
        pairs = [
            run.results["nll"] - known[task, tuning, baseline, run.seed].results["nll"]
            for run in group
            if (task, tuning, baseline, run.seed) in known
        ]
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


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error and the count; None where there are too few for them."""
    count = len(values)
    return {
        "mean": statistics.fmean(values) if count else None,
        "se": statistics.stdev(values) / math.sqrt(count) if count > 1 else None,
        "n": count,
    }


def over_seeds(values: Mapping[tuple[str, int], float]) -> dict[str, Any]:
    """Mean over tasks, its standard error over seeds and their count: how much more tasks differ than seeds is no error.

    Where each seed has each task this is `mean_and_error` of the seeds' means.

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
    told = min(map(len, by_task.values())) > 1
    return {
        "mean": statistics.fmean(means.values()),
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


# Where prompts end up.


def place(runs: Sequence[Run], num_permutations: int = 9999, seed: int = 0) -> dict[str, Any]:
    """Whether a trained prompt's place tells its prior; of runs with one tuning, tasks and seeds as they come.

    Distances are root mean squares over all coordinates, in the model's own units.

    Args:
        runs: With names, of prompts of one shape.
        num_permutations: Of the priors' names within each task and seed.
        seed: Of the permutations.

    Returns:
        `runs` and `priors`: how many. `moved`: mean distance from the own start. `to_other_starts`: mean distance from the
        starts of other priors with the same task and seed. `nearest_start`: share of prompts that are nearer to their own
        start than to any of those. `likeliest`: share of prompts to which, of the priors compared, their own gives the
        highest density; `likeliest_at_start`: the same of the starts; `chance`: 1 / priors. `distances`: mean distance
        between prompts that differ in the `seed`, the `task` or the `prior` alone. `mmd`: see `between_and_within`;
        None with fewer than two seeds.

    Raises:
        ValueError: No two runs differ in their prior alone.
    """
    priors = {run.prior for run in runs}
    others = {
        run.name: [other for other in runs if (other.task, other.seed) == (run.task, run.seed) and other is not run]
        for run in runs
    }
    compared = [run for run in runs if others[run.name]]
    if not compared:
        raise ValueError(f"runs must be of at least 2 priors with one task and seed, got {', '.join(sorted(priors))}")
    moved = [distance(run.prompt, run.start) for run in compared]
    away = [[distance(run.prompt, other.start) for other in others[run.name]] for run in compared]

    def alone(*same: str) -> float | None:
        pairs = [
            distance(one.prompt, other.prompt)
            for one, other in itertools.combinations(runs, 2)
            if all(
                (getattr(one, name) == getattr(other, name)) == (name in same) for name in ("task", "prior", "seed")
            )
        ]
        return statistics.fmean(pairs) if pairs else None

    return {
        "runs": len(runs),
        "priors": len(priors),
        "moved": statistics.fmean(moved),
        "to_other_starts": statistics.fmean(itertools.chain(*away)),
        "nearest_start": statistics.fmean(own < min(rest) for own, rest in zip(moved, away, strict=True)),
        "likeliest": _likeliest(compared, others, lambda run: run.prompt),
        "likeliest_at_start": _likeliest(compared, others, lambda run: run.start),
        "chance": 1 / len(priors),
        "distances": {"seed": alone("task", "prior"), "task": alone("prior", "seed"), "prior": alone("task", "seed")},
        "mmd": between_and_within(runs, num_permutations, seed),
    }


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, over all coordinates."""
    return float((one.double() - other.double()).square().mean().sqrt())


def _likeliest(runs: Sequence[Run], others: Mapping[str, Sequence[Run]], of: Callable[[Run], Tensor]) -> float:
    def density(prompt: Tensor, owner: Run) -> float:
        with torch.no_grad():
            return sum(float(prior.log_prob(at)) for prior, at in zip(owner.priors, prompt, strict=True))

    won = [density(of(run), run) > max(density(of(run), other) for other in others[run.name]) for run in runs]
    return statistics.fmean(won)


def between_and_within(runs: Sequence[Run], num_permutations: int, seed: int) -> dict[str, Any] | None:
    """Squared MMD between the virtual tokens of two runs: of different priors against one prior.

    Pairs are of one task and different seeds, so that neither a shared draw nor a shared order of the data brings two
    runs together. The kernel's width is the median distance between the virtual tokens of all starts; of deep prompts
    the mean over layers. The test shuffles the priors' names among the runs of each task and seed.

    Returns:
        `between` and `within`: mean squared MMD. `p_value`: share of shufflings, this one included, whose difference of
        the two is as large. `num_permutations`. None where no two runs differ in their seed alone.
    """
    pairs = [
        (i, j)
        for i, j in itertools.combinations(range(len(runs)), 2)
        if runs[i].task == runs[j].task and runs[i].seed != runs[j].seed
    ]
    names = sorted({run.prior for run in runs})
    labels = torch.tensor([names.index(run.prior) for run in runs])
    first, second = (torch.tensor([pair[side] for pair in pairs], dtype=torch.long) for side in (0, 1))
    same = labels[first] == labels[second]
    if not same.any() or same.all():
        return None
    widths = [median_distance(torch.cat([run.start[layer] for run in runs])) for layer in range(len(runs[0].prompt))]
    found = torch.tensor(
        [
            statistics.fmean(
                float(squared_mmd(runs[i].prompt[layer], runs[j].prompt[layer], width))
                for layer, width in enumerate(widths)
            )
            for i, j in pairs
        ],
        dtype=torch.float64,
    )

    def contrast(labels: Tensor) -> float:
        same = labels[first] == labels[second]
        return float(found[~same].mean() - found[same].mean())

    blocks = [[runs.index(run) for run in group] for group in grouped(runs, "task", "seed").values()]
    generator = torch.Generator().manual_seed(seed)
    observed, reached = contrast(labels), 1
    for _ in range(num_permutations):
        shuffled = labels.clone()
        for block in blocks:
            order = torch.randperm(len(block), generator=generator)
            shuffled[block] = labels[torch.tensor(block)[order]]
        # Not a number where a shuffling leaves no pair of one prior: counted as reached, which only makes p larger.
        reached += not contrast(shuffled) < observed - 1e-12
    return {
        "between": float(found[~same].mean()),
        "within": float(found[same].mean()),
        "p_value": reached / (num_permutations + 1),
        "num_permutations": num_permutations,
    }


# Far from the vocabulary.


def regions(
    runs: Sequence[Run], radius: Callable[[Tensor], Tensor], edge: float, no_prompt: Mapping[str, float]
) -> dict[str, Any]:
    """Whether prompts work that lie where no vocabulary does, at the embedding layer.

    Args:
        runs: With names.
        radius: Of virtual tokens, `[P, d]` to `[P]`: how far out they lie as the vocabulary's spread goes.
        edge: Radius within which nearly all of the vocabulary lies.
        no_prompt: NLL without a prompt, by task.

    Returns:
        `arms`: for each tuning and prior the share of virtual tokens beyond the edge, `outside_at_start` and
        `outside`, and `gain` over no prompt in nats per answer token (`over_seeds`). `tunings`: for each tuning
        `far_started` and `far_ended`, runs of which more than half the virtual tokens started or ended beyond the edge:
        `runs`, and how many of them are `better_than_none`; and `difference`, the mean NLL of runs that started far less
        that of the runs of the same task and seed that did not (`over_seeds`), None where all or none did.
    """

    def outside(prompt: Tensor) -> float:
        return float((radius(prompt[0]) > edge).double().mean())

    at_start, at_end = ({run.name: outside(of(run)) for run in runs} for of in (_start, _prompt))
    gains = {run.name: no_prompt[run.task] - run.results["nll"] for run in runs}
    arms = [
        {
            "tuning": tuning,
            "prior": prior,
            "outside_at_start": statistics.fmean(at_start[run.name] for run in group),
            "outside": statistics.fmean(at_end[run.name] for run in group),
            "gain": over_seeds({(run.task, run.seed): gains[run.name] for run in group}),
        }
        for (tuning, prior), group in grouped(runs, "tuning", "prior").items()
    ]

    def counted(group: Sequence[Run], shares: Mapping[str, float]) -> dict[str, int]:
        far = [run.name for run in group if shares[run.name] > 0.5]
        return {"runs": len(far), "better_than_none": sum(gains[name] > 0 for name in far)}

    def difference(group: Sequence[Run]) -> dict[str, Any] | None:
        pairs = {}
        for same in grouped(group, "task", "seed").values():
            far = [run.results["nll"] for run in same if at_start[run.name] > 0.5]
            near = [run.results["nll"] for run in same if at_start[run.name] <= 0.5]
            if far and near:
                pairs[same[0].task, same[0].seed] = statistics.fmean(far) - statistics.fmean(near)
        return over_seeds(pairs) if pairs else None

    tunings = {
        tuning: {
            "far_started": counted(group, at_start),
            "far_ended": counted(group, at_end),
            "difference": difference(group),
        }
        for (tuning,), group in grouped(runs, "tuning").items()
    }
    return {"arms": arms, "edge": edge, "tunings": tunings}


def _start(run: Run) -> Tensor:
    return run.start


def _prompt(run: Run) -> Tensor:
    return run.prompt


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
