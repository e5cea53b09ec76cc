"""Several runs of one task: how far apart their prompts and their figures lie, and what lies between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import check_at_least, check_choice
from .common import Result, band, check_points, check_same_shape, percentile_among


DISTANCES = ("frobenius", "cosine")

# Groups of random prompts that a percentile and a band take.
_GROUPS = 20


@dataclass(frozen=True, eq=False)
class PromptDistances(Result):
    """Distances between the prompts of several runs.

    Attributes:
        metric: `"frobenius"` or `"cosine"`.
        raw: Virtual token to virtual token of the same place, shape `[R, R]`.
        matched: After the matching of virtual tokens that makes it smallest, shape `[R, R]`; never above `raw`.
        assignment: `[i, j, p]` is the virtual token of prompt j that is matched to p of prompt i, shape `[R, R, P]`.
    """

    metric: str
    raw: Tensor
    matched: Tensor
    assignment: Tensor


def prompt_distances(prompts: Tensor, metric: str = "frobenius") -> PromptDistances:
    """Distances between prompts, raw and after an optimal matching of their virtual tokens (Hungarian algorithm).

    Args:
        prompts: Shape `[R, P, d]` with R >= 2.
        metric: `"frobenius"`: the norm of the difference. `"cosine"`: the mean over virtual tokens of 1 − cosine.

    Raises:
        ValueError: The metric is unknown, there are fewer than 2 prompts, or they are empty or not finite.
    """
    from scipy.optimize import linear_sum_assignment

    prompts = check_points("prompts", prompts, "[R, P, d]").double().cpu()
    check_choice("metric", metric, DISTANCES)
    check_at_least("the number of prompts", len(prompts), 2, "a distance is between two")
    runs, count = prompts.shape[:2]
    raw, matched = torch.zeros(runs, runs, dtype=torch.float64), torch.zeros(runs, runs, dtype=torch.float64)
    assignment = torch.arange(count).repeat(runs, runs, 1)
    for i in range(runs):
        for j in range(i + 1, runs):
            cost = _token_costs(prompts[i], prompts[j], metric)
            chosen = torch.as_tensor(linear_sum_assignment(cost.numpy())[1])
            assignment[i, j], assignment[j, i] = chosen, chosen.argsort()
            costs = torch.stack([cost.diagonal().sum(), cost[torch.arange(count), chosen].sum()])
            # Rounding of the two sums must not carry the smallest above the other.
            costs[1] = costs.min()
            costs = costs.sqrt() if metric == "frobenius" else costs / count
            raw[i, j] = raw[j, i] = costs[0]
            matched[i, j] = matched[j, i] = costs[1]
    return PromptDistances(metric, raw, matched, assignment)


def _token_costs(first: Tensor, second: Tensor, metric: str) -> Tensor:
    """Squared distances, or 1 − cosine, of every pair of virtual tokens, `[P, P]`."""
    if metric == "frobenius":
        return _distances(first, second).square()
    # |u − v|² / 2 of unit vectors is 1 − cosine, and exactly 0 where they are equal.
    units = (torch.nn.functional.normalize(prompt, dim=-1) for prompt in (first, second))
    return _distances(*units).square() / 2


def _distances(first: Tensor, second: Tensor) -> Tensor:
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True, eq=False)
class Equidistance(Result):
    """Whether prompts lie equally far from one another, in the full space.

    Attributes:
        metric: Of the distances.
        matched: Whether virtual tokens were matched first.
        coefficient_of_variation: Standard deviation of the pairwise distances over their mean; 0 is equidistant.
        mean: Of the pairwise distances.
        null_coefficients: Coefficient of variation of each group of as many random prompts, shape `[g]`.
        null_means: Mean distance of each such group, shape `[g]`.
        band: 5th and 95th percentile of `null_coefficients`, shape `[2]`.
        percentile: Percent of random groups that are more equidistant, by their coefficient of variation.
        mean_percentile: Percent of random groups that lie closer together.
    """

    metric: str
    matched: bool
    coefficient_of_variation: float
    mean: float
    null_coefficients: Tensor
    null_means: Tensor
    band: Tensor
    percentile: float
    mean_percentile: float


def equidistance(prompts: Tensor, draws: Tensor, metric: str = "frobenius", matched: bool = False) -> Equidistance:
    """Compare the spread of pairwise distances with that of random prompts from the prior.

    In hundreds of dimensions any unrelated points are nearly equidistant, and t-SNE shows them as a ring whatever
    they mean. Only a coefficient of variation outside the null's band says something of the runs.

    Args:
        prompts: One a run, shape `[R, P, d]` with R >= 3.
        draws: Prompts drawn from the prior, shape `[n, P, d]` with n >= 20 R; cut into groups of R in their order.
        metric: As in `prompt_distances`.
        matched: Whether virtual tokens are matched first.

    Raises:
        ValueError: There are too few prompts or draws, or their shapes differ.
    """
    prompts, draws = check_points("prompts", prompts, "[R, P, d]"), check_points("draws", draws, "[n, P, d]")
    check_same_shape("draws[0]", draws[0], "prompts[0]", prompts[0])
    check_at_least("the number of prompts", len(prompts), 3, "two have one distance, which can't vary")
    runs = len(prompts)
    check_at_least("the number of draws", len(draws), _GROUPS * runs, f"{_GROUPS} groups of {runs} make the null")

    def spread(group: Tensor) -> tuple[float, float]:
        found = prompt_distances(group, metric)
        distances = found.matched if matched else found.raw
        pairs = distances[torch.ones_like(distances, dtype=torch.bool).triu(1)]
        mean = float(pairs.mean())
        return (float(pairs.std(correction=0)) / mean if mean > 0 else 0.0), mean

    coefficient, mean = spread(prompts)
    groups = draws[: len(draws) // runs * runs].reshape(-1, *prompts.shape)
    null = torch.tensor([spread(group) for group in groups], dtype=torch.float64)
    own = torch.tensor([[coefficient, mean]], dtype=torch.float64)
    percentiles = percentile_among(own, null)[0].tolist()
    return Equidistance(metric, matched, coefficient, mean, null[:, 0], null[:, 1], band(null[:, 0]), *percentiles)


@dataclass(frozen=True, eq=False)
class Spread(Result):
    """A figure over several runs.

    Attributes:
        count: Runs.
        mean: Over runs.
        variance: Unbiased.
        std: Its root.
        minimum: Over runs.
        maximum: Over runs.
        interval: 95 % interval of the mean by Student's t, shape `[2]`.
    """

    count: int
    mean: float
    variance: float
    std: float
    minimum: float
    maximum: float
    interval: Tensor


def metric_spread(values: Sequence[float] | Tensor) -> Spread:
    """Mean and variance of a metric over two or more runs.

    Raises:
        ValueError: There are fewer than two values, or one is not finite.
    """
    from scipy import stats

    figures = torch.as_tensor(values, dtype=torch.float64).flatten()
    check_at_least("the number of values", len(figures), 2, "one run has no variance")
    check_points("values", figures, "[R]")
    mean, variance = float(figures.mean()), float(figures.var())
    half = float(stats.t.ppf(0.975, len(figures) - 1)) * (variance / len(figures)) ** 0.5
    interval = torch.tensor([mean - half, mean + half], dtype=torch.float64)
    return Spread(len(figures), mean, variance, variance**0.5, float(figures.min()), float(figures.max()), interval)


# The straight line between two prompts.


def line_points(start: Tensor, end: Tensor, count: int = 11) -> Tensor:
    """Prompts at equal steps on the straight line between two, both ends exactly included.

    Args:
        start: Any shape, for example `[P, d]` or `[S, P, d]`.
        end: The same shape.
        count: Number of prompts, >= 3.

    Returns:
        Shape `[count, *start.shape]`.
    """
    start, end = check_points("start", start, "[..., P, d]"), check_points("end", end, "[..., P, d]")
    check_same_shape("end", end, "start", start)
    check_at_least("count", count, 3, "two ends and a point between")
    return torch.stack([torch.lerp(start, end, index / (count - 1)) for index in range(count)])


@dataclass(frozen=True, eq=False)
class Barrier(Result):
    """Losses along the straight line between two prompts.

    Attributes:
        positions: 0 at the first prompt, 1 at the second, shape `[count]`.
        losses: Nats per token, shape `[count]`.
        height: Highest loss minus the mean of both ends (Frankle et al. 2020); their linear instability.
        above_line: Highest excess over the straight line between the ends' losses (Entezari et al. 2022), which does
            not count a difference between the ends; >= 0.
        highest: Position of the highest loss.
    """

    positions: Tensor
    losses: Tensor
    height: float
    above_line: float
    highest: float


def barrier(losses: Sequence[float] | Tensor) -> Barrier:
    """The barrier between two prompts from the losses at `line_points`, in nats per token.

    Frankle, Dziugaite, Roy & Carbin (2020), "Linear mode connectivity and the lottery ticket hypothesis", section 2.

    Raises:
        ValueError: There are fewer than 3 losses, or one is not finite.
    """
    values = torch.as_tensor(losses, dtype=torch.float64).flatten()
    check_at_least("the number of losses", len(values), 3, "two ends and a point between")
    check_points("losses", values, "[count]")
    positions = torch.linspace(0, 1, len(values), dtype=torch.float64)
    line = torch.lerp(values[0], values[-1], positions)
    return Barrier(
        positions=positions,
        losses=values,
        height=float(values.max() - (values[0] + values[-1]) / 2),
        above_line=float((values - line).max().clamp_min(0)),
        highest=float(positions[values.argmax()]),
    )
