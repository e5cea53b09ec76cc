"""Shape and place of prompts: closed forms, planted structure, and the prior's own expectation."""

import math

import pytest
import torch
from scipy import stats

from priors_peft.analysis.geometry import (
    chi_percentile,
    effective_rank,
    geometry_series,
    mahalanobis_radius,
    mean_pairwise_cosine,
    norm_percentile,
    token_drift,
    token_geometry,
)
from priors_peft.analysis.tokens import best_scores
from priors_peft.priors import GaussianPrior, StructuredPrior
from priors_peft.prompt import PriorPromptEncoder


V, D, P, N = 400, 16, 6, 100
MEASURES = {
    "drift", "effective_rank", "mean_pairwise_cosine", "nearest_cosine", "norm", "norm_percentile", "radius",
    "radius_chi_percentile", "squared_mmd",
}  # fmt: skip


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vocabulary():
    return rows(V, D) @ rows(D, D, seed=1) + rows(D, seed=2)


@pytest.fixture(scope="module")
def prior(vocabulary):
    return StructuredPrior.fit(vocabulary)


@pytest.fixture(scope="module")
def draws(prior):
    generator = torch.Generator().manual_seed(5)
    return torch.stack([prior.sample(P, generator) for _ in range(N)])


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_prompt_of_equal_singular_values_has_its_rank_as_effective_rank(rank):
    left, _ = torch.linalg.qr(rows(P, rank))
    right, _ = torch.linalg.qr(rows(D, rank, seed=1))
    torch.testing.assert_close(effective_rank(3 * left @ right.mT), torch.tensor(float(rank)), rtol=1e-5, atol=0)


def test_effective_rank_is_the_exponential_entropy_of_the_singular_values():
    prompt = torch.diag(torch.tensor([3.0, 1.0]))
    assert effective_rank(prompt).item() == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert effective_rank(7 * prompt).item() == pytest.approx(effective_rank(prompt).item())


def test_copies_of_one_vector_have_rank_one_and_cosine_one():
    prompt = rows(1, D).expand(P, D)
    assert effective_rank(prompt).item() == pytest.approx(1, abs=1e-4)
    assert mean_pairwise_cosine(prompt).item() == pytest.approx(1, abs=1e-5)
    assert mean_pairwise_cosine(torch.eye(P)).item() == pytest.approx(0, abs=1e-6)


def test_norm_percentile_counts_the_shorter_rows():
    vocabulary = torch.arange(1.0, 101)[:, None] * torch.nn.functional.normalize(rows(100, D), dim=-1)
    prompt = torch.nn.functional.normalize(rows(3, D, seed=1), dim=-1) * torch.tensor([[0.5], [50.5], [1000.0]])
    torch.testing.assert_close(norm_percentile(prompt, vocabulary), torch.tensor([0, 50, 100]).double())
    kept = norm_percentile(prompt, vocabulary, excluded=range(50))
    torch.testing.assert_close(kept, torch.tensor([0, 0, 100]).double())


def test_the_radius_under_a_gaussian_prior_follows_the_chi_distribution(prior):
    drawn = torch.stack([prior.sample(P, torch.Generator().manual_seed(seed)) for seed in range(300)])
    radius = mahalanobis_radius(drawn, prior)
    assert stats.kstest(radius.flatten().numpy(), stats.chi(D).cdf).pvalue > 1e-3
    percentile = chi_percentile(radius, D)
    torch.testing.assert_close(percentile, torch.from_numpy(100 * stats.chi(D).cdf(radius.numpy())))
    assert stats.kstest(percentile.flatten().numpy() / 100, "uniform").pvalue > 1e-3


def test_the_radius_does_not_depend_on_the_coordinates():
    reference, points = rows(V, D), rows(N, P, D, seed=1)
    map_ = torch.linalg.qr(rows(D, D, seed=2))[0] * torch.linspace(0.5, 2, D)
    plain, moved = (StructuredPrior.fit(each, shrinkage=1e-9) for each in (reference, reference @ map_))
    expected = mahalanobis_radius(points, plain)
    torch.testing.assert_close(mahalanobis_radius(points @ map_, moved), expected, rtol=1e-4, atol=0)


def test_token_drifts_join_to_the_encoders_drift(prior, draws):
    encoder = PriorPromptEncoder([prior], "whitened", draws[:1])
    expected = encoder.drift(draws[1:2])
    found = token_drift(draws[1], draws[0], prior).square().mean().sqrt()
    torch.testing.assert_close(found, expected.detach().double(), rtol=1e-5, atol=0)
    moved = draws[0].clone()
    moved[2] = prior.to_prompt(prior.to_whitened(draws[0]) + 0.5)[2]
    expected = torch.zeros(P).double()
    expected[2] = 0.5
    torch.testing.assert_close(token_drift(moved, draws[0], prior), expected, rtol=1e-4, atol=1e-5)


def test_token_geometry_is_that_of_each_virtual_token(prior, draws, vocabulary):
    prompt = draws[0].clone()
    prompt[1] = prior.loc + 30 * (draws[0][1] - prior.loc)
    found = token_geometry(prompt, draws[0], draws[1:], prior, vocabulary)
    assert found.radius_percentile[1] == 100 and found.radius_chi_percentile[1] == pytest.approx(100)
    assert (found.drift > 0).tolist() == [False, True, False, False, False, False]
    torch.testing.assert_close(found.radius, mahalanobis_radius(prompt, prior))
    alone = token_geometry(prompt[[1]], draws[0][[1]], draws[1:], prior, vocabulary)
    assert alone.norm_percentile == found.norm_percentile[1]


def test_the_series_is_the_measure_of_each_snapshot_alone(prior, draws, vocabulary):
    snapshots = torch.lerp(draws[0], vocabulary[:P], torch.linspace(0, 1, 4)[:, None, None])
    series = geometry_series(snapshots, draws[1:], prior, vocabulary, steps=[0, 10, 20, 30], excluded=[300])
    assert series.measures.keys() == MEASURES
    assert series.steps == [0, 10, 20, 30]
    for index, snapshot in enumerate(snapshots):
        alone = geometry_series(snapshot[None], draws[1:], prior, vocabulary, draws[0], excluded=[300])
        for name, measure in alone.measures.items():
            torch.testing.assert_close(measure.values[0], series.measures[name].values[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(measure.band, series.measures[name].band, rtol=1e-9, atol=1e-12)
    assert series.measures["drift"].values[0] == 0
    assert series.measures["nearest_cosine"].values[-1] == pytest.approx(1)
    assert series.measures["nearest_cosine"].percentile[-1] == 100


def test_draws_from_the_prior_lie_in_its_band_nine_times_in_ten(prior, draws, vocabulary):
    generator = torch.Generator().manual_seed(8)
    others = torch.stack([prior.sample(P, generator) for _ in range(300)])
    series = geometry_series(others, draws, prior, vocabulary, initial_prompt=draws[0])
    for name, measure in series.measures.items():
        inside = ((measure.values >= measure.band[0]) & (measure.values <= measure.band[1])).double().mean().item()
        assert 0.8 < inside < 0.98, name
        assert measure.band[0] < measure.median < measure.band[1]
        assert 40 < measure.percentile.mean() < 60


def test_a_collapsed_prompt_leaves_the_band(prior, draws, vocabulary):
    collapsed = draws[0][:1] + 0.01 * rows(P, D, seed=3)
    series = geometry_series(collapsed[None], draws, prior, vocabulary)
    assert series.measures["effective_rank"].percentile == 0
    assert series.measures["mean_pairwise_cosine"].percentile == 100
    assert series.measures["squared_mmd"].percentile == 100


def test_known_cosines_and_the_order_of_the_draws_change_nothing(prior, draws, vocabulary):
    expected = geometry_series(draws[:2], draws, prior, vocabulary).to_dict()
    known = geometry_series(draws[:2], draws, prior, vocabulary, draw_cosines=best_scores(draws, vocabulary))
    assert known.to_dict() == expected
    turned = geometry_series(draws[:2], draws.flip(0), prior, vocabulary)
    for name, measure in turned.measures.items():
        assert measure.band.tolist() == pytest.approx(expected["measures"][name]["band"], rel=1e-6)


def test_a_single_virtual_token_has_no_pairs(prior, draws, vocabulary):
    series = geometry_series(draws[:2, :1], draws[:, :1], prior, vocabulary)
    assert series.measures.keys() == MEASURES - {"mean_pairwise_cosine", "squared_mmd"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshots": rows(P, D)}, r"snapshots must be .* shape \[T, P, d\]"),
        (
            {"draws": rows(5, P + 1, D)},
            r"draws\[0\] must have the shape of snapshots\[0\], got \[7, 16\] and \[6, 16\]",
        ),
        ({"draws": rows(1, P, D)}, "the number of draws must be an integer >= 2, got 1: draw 200"),
        ({"vocabulary": rows(V, 8)}, "snapshots must be as wide as vocabulary, got widths 16 and 8"),
        ({"initial_prompt": rows(2, D)}, r"initial_prompt must have the prompt's shape \[6, 16\], got \[2, 16\]"),
        ({"steps": [1, 2]}, "steps must have one entry for each of the 3 snapshots, got 2"),
        ({"draw_cosines": rows(3, P)}, r"draw_cosines must have shape \[10, 6\], got \[3, 6\]"),
        ({"prior": GaussianPrior(torch.zeros(4), torch.ones(4))}, "prior's width 4"),
    ],
)
def test_bad_input_is_named(change, message, prior, vocabulary):
    given = {"snapshots": rows(3, P, D), "draws": rows(10, P, D), "prior": prior, "vocabulary": vocabulary} | change
    with pytest.raises(ValueError, match=message):
        geometry_series(**given)
