"""Where prompts end up: by their priors' own places, or far from the vocabulary."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .compare import Run, grouped, mean_and_error
from .discrepancy import median_distance, squared_mmd


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
        `outside`, and `gain` over no prompt in nats per answer token (`mean_and_error`). `tunings`: for each tuning
        `far_started` and `far_ended`, runs of which more than half the virtual tokens started or ended beyond the edge:
        `runs`, and how many of them are `better_than_none`; and `difference`, the mean NLL of runs that started far less
        that of the runs of the same task and seed that did not (`mean_and_error`), None where all or none did.
    """

    def outside(prompt: Tensor) -> float:
        return float((radius(prompt[0]) > edge).double().mean())

    at_start, at_end = ({run.name: outside(getattr(run, of)) for run in runs} for of in ("start", "prompt"))
    gains = {run.name: no_prompt[run.task] - run.results["nll"] for run in runs}
    arms = [
        {
            "tuning": tuning,
            "prior": prior,
            "outside_at_start": statistics.fmean(at_start[run.name] for run in group),
            "outside": statistics.fmean(at_end[run.name] for run in group),
            "gain": mean_and_error({(run.task, run.seed): gains[run.name] for run in group}),
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
        return mean_and_error(pairs) if pairs else None

    tunings = {
        tuning: {
            "far_started": counted(group, at_start),
            "far_ended": counted(group, at_end),
            "difference": difference(group),
        }
        for (tuning,), group in grouped(runs, "tuning").items()
    }
    return {"arms": arms, "edge": edge, "tunings": tunings}
