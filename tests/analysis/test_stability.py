"""Several runs: matched copies lie at distance 0, random prompts in their own null, barriers as published."""

import itertools

import pytest
import torch
from scipy import stats

from priors_peft.analysis.stability import (
    DISTANCES,
    barrier,
    equidistance,
    line_points,
    metric_spread,
    prompt_distances,
)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", DISTANCES)
def test_permuted_copies_match_at_distance_zero(metric):
    prompt, order = rows(20, 64), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = prompt_distances(torch.stack([prompt, prompt[order]]), metric)
    assert found.matched[0, 1] == 0
    assert found.raw[0, 1] > 0.1
    assert torch.equal(order[found.assignment[0, 1]], torch.arange(20))
    assert torch.equal(found.assignment[1, 0], order)


@pytest.mark.parametrize("metric", DISTANCES)
def test_the_matching_is_the_best_of_all(metric):
    first, second = rows(5, 6), rows(5, 6, seed=1)
    found = prompt_distances(torch.stack([first, second]), metric)

    def distance(order: tuple[int, ...]) -> float:
        other = second[list(order)].double()
        if metric == "frobenius":
            return float((first.double() - other).norm())
        return float(1 - torch.nn.functional.cosine_similarity(first.double(), other, dim=-1).mean())

    assert found.raw[0, 1].item() == pytest.approx(distance((0, 1, 2, 3, 4)))
    best = min(itertools.permutations(range(5)), key=distance)
    assert found.matched[0, 1].item() == pytest.approx(distance(best))
    assert tuple(found.assignment[0, 1].tolist()) == best


@pytest.mark.parametrize("metric", DISTANCES)
def test_distances_are_symmetric_and_follow_the_order_of_the_prompts(metric):
    prompts, order = rows(4, 6, 8), torch.tensor([2, 0, 3, 1])
    found, turned = prompt_distances(prompts, metric), prompt_distances(prompts[order], metric)
    for name in ("raw", "matched"):
        distances = getattr(found, name)
        assert torch.equal(distances, distances.mT) and (distances.diagonal() == 0).all()
        torch.testing.assert_close(getattr(turned, name), distances[order][:, order])
    assert (found.matched <= found.raw).all()


def test_random_prompts_lie_anywhere_in_their_own_null():
    groups = rows(100, 84, 4, 8)
    percentiles = [equidistance(drawn[:4], drawn[4:]).percentile for drawn in groups]
    assert stats.kstest([value / 100 for value in percentiles], "uniform").pvalue > 1e-3


def test_runs_of_two_kinds_are_not_equidistant_and_a_simplex_is():
    draws = rows(200, 4, 32, seed=1)
    pairs = rows(2, 4, 32, seed=2).repeat(2, 1, 1) + 0.1 * rows(4, 4, 32, seed=3)
    found = equidistance(pairs, draws)
    assert found.percentile == 100 and found.coefficient_of_variation > found.band[1]
    simplex = torch.eye(4)[:, None].expand(4, 4, 4).repeat(1, 1, 8)
    found = equidistance(simplex, draws, matched=True)
    assert found.coefficient_of_variation == pytest.approx(0, abs=1e-9) and found.percentile == 0
    copies = torch.stack([draws[0], draws[0].flip(0), draws[0].roll(1, 0)])
    assert equidistance(copies, draws, matched=True).mean == 0 < equidistance(copies, draws).mean
    close = equidistance(draws[0] + 0.1 * rows(4, 4, 32, seed=4), draws)
    assert close.mean_percentile == 0 and len(close.null_means) == 50


def test_the_spread_of_a_metric_is_that_of_its_runs():
    found = metric_spread([0.5, 0.7, 0.6, 0.8])
    assert (found.count, found.minimum, found.maximum) == (4, 0.5, 0.8)
    assert found.mean == pytest.approx(0.65) and found.variance == pytest.approx(0.05 / 3)
    expected = stats.t.interval(0.95, 3, loc=0.65, scale=(0.05 / 3 / 4) ** 0.5)
    assert found.interval.tolist() == pytest.approx(expected)


def test_the_line_has_both_prompts_as_its_ends():
    start, end = rows(2, 3, 4), rows(2, 3, 4, seed=1)
    line = line_points(start, end, 5)
    assert torch.equal(line[0], start) and torch.equal(line[-1], end)
    torch.testing.assert_close(line[2], (start + end) / 2)
    torch.testing.assert_close(line_points(end, start, 5).flip(0), line)


def test_the_barrier_is_the_published_figure():
    found = barrier([1.0, 1.4, 2.5, 1.6, 2.0])
    assert found.height == pytest.approx(2.5 - 1.5)
    assert found.above_line == pytest.approx(2.5 - 1.5)
    assert found.highest == 0.5
    straight = barrier([1.0, 1.5, 2.0])
    assert straight.above_line == 0 and straight.height == pytest.approx(0.5)
    assert barrier([1.0, 0.2, 1.0]).height == 0


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match="the number of prompts must be an integer >= 2, got 1: a distance is between"
    ):
        prompt_distances(rows(1, 3, 4))
    with pytest.raises(ValueError, match="metric must be one of frobenius, cosine, got 'l2'"):
        prompt_distances(rows(2, 3, 4), "l2")
    with pytest.raises(ValueError, match="the number of prompts must be an integer >= 3, got 2"):
        equidistance(rows(2, 3, 4), rows(90, 3, 4))
    with pytest.raises(ValueError, match="the number of draws must be an integer >= 60, got 59: 20 groups of 3"):
        equidistance(rows(3, 3, 4), rows(59, 3, 4))
    with pytest.raises(ValueError, match=r"draws\[0\] must have the shape of prompts\[0\], got \[3, 5\] and \[3, 4\]"):
        equidistance(rows(3, 3, 4), rows(90, 3, 5))
    with pytest.raises(ValueError, match="the number of values must be an integer >= 2, got 1: one run"):
        metric_spread([0.5])
    with pytest.raises(ValueError, match="values must be finite"):
        metric_spread([0.5, float("nan")])
    with pytest.raises(ValueError, match=r"end must have the shape of start, got \[3, 5\] and \[3, 4\]"):
        line_points(rows(3, 4), rows(3, 5))
    with pytest.raises(ValueError, match="count must be an integer >= 3, got 2"):
        line_points(rows(3, 4), rows(3, 4), 2)
    with pytest.raises(ValueError, match="the number of losses must be an integer >= 3, got 2"):
        barrier([1.0, 2.0])
