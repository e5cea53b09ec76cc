"""A stream's moments are the two-pass moments, however it is cut."""

import pytest
import torch
from sklearn.covariance import ledoit_wolf, oas

from priors_peft.priors import ExclusionPrior, GaussianPrior, InterpolationPrior, Moments, StructuredPrior
from priors_peft.priors.structured import fit_moments


def correlated(count=3000, dim=12, offset=50.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + offset


def streamed(rows, size=97, **settings):
    moments = Moments(**settings)
    for part in rows.split(size):
        moments.update(part)
    return moments


def test_streaming_equals_two_passes():
    rows = correlated()
    moments, wide = streamed(rows), rows.double()
    centred = wide - wide.mean(0)
    assert torch.allclose(moments.mean, wide.mean(0), rtol=1e-6)
    assert torch.allclose(moments.covariance, centred.mT @ centred / len(rows), rtol=1e-6, atol=1e-6)
    assert moments.fourth == pytest.approx(centred.square().sum(-1).square().mean().item(), rel=1e-6)
    assert moments.shape == tuple(rows.shape)


def test_the_cut_into_batches_does_not_matter():
    rows = correlated()
    one, other = streamed(rows, 97, keep=50), streamed(rows, 1000, keep=50)
    assert torch.allclose(one.covariance, other.covariance, rtol=1e-9)
    assert torch.equal(one.sample, other.sample) and len(one.sample) == 50
    assert not torch.equal(one.sample, streamed(rows, 97, keep=50, seed=1).sample)


def test_weights_are_repetitions():
    rows = correlated(40)
    times = torch.arange(1, 41)
    weighted = Moments()
    weighted.update(rows, times)
    repeated = streamed(rows.repeat_interleave(times, 0))
    assert torch.allclose(weighted.mean, repeated.mean) and torch.allclose(weighted.covariance, repeated.covariance)
    share = (weighted.sample[:, None] == rows[-1]).all(-1).float().mean()  # rows are drawn as often as they count
    assert share == pytest.approx(40 / float(times.sum()), abs=0.01)
    with pytest.raises(ValueError, match="weights must come with the first rows"):
        weighted.update(rows, times)
    assert weighted.fourth == pytest.approx(repeated.fourth) and weighted.count == repeated.count


@pytest.mark.parametrize("count", [8, 3000])
@pytest.mark.parametrize("shrinkage, theirs", [("ledoit_wolf", ledoit_wolf), ("oas", oas)])
def test_streamed_shrinkage_is_scikit_learns(count, shrinkage, theirs):
    rows = correlated(count, offset=0.0)
    _, covariance = fit_moments(streamed(rows), shrinkage)
    expected = torch.from_numpy(theirs(rows.double().numpy())[0])
    assert torch.allclose(covariance, expected, rtol=1e-5, atol=1e-5 * expected.diagonal().mean())


@pytest.mark.parametrize("family, settings", [(GaussianPrior, {"diagonal": True}), (StructuredPrior, {})])
def test_families_fitted_on_a_stream_are_those_fitted_on_its_rows(family, settings):
    rows = correlated()
    one, other = family.fit(streamed(rows), **settings), family.fit(rows, **settings)
    prompt = other.sample(5, torch.Generator().manual_seed(0))
    assert torch.allclose(one.log_prob(prompt), other.log_prob(prompt), rtol=1e-4)


def test_an_interpolation_and_an_exclusion_take_streams():
    rows, others = correlated(), correlated(seed=1, offset=-3.0)
    prompt = torch.zeros(2, 12)
    one = InterpolationPrior.fit((streamed(rows), streamed(others)))
    assert torch.allclose(one.log_prob(prompt), InterpolationPrior.fit((rows, others)).log_prob(prompt), rtol=1e-3)
    inner = ExclusionPrior.fit(streamed(rows)).inner
    assert inner == pytest.approx(ExclusionPrior.fit(rows).inner.item(), rel=1e-3)


def test_round_trip_goes_on():
    rows = correlated()
    half = streamed(rows[:1500])
    again = Moments.from_state_dict(half.state_dict())
    again.update(rows[1500:])
    assert torch.allclose(again.covariance, streamed(rows).covariance)


def test_what_is_not_finite_or_empty_is_refused():
    with pytest.raises(ValueError, match="reference must be finite"):
        Moments().update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="got an empty stream"):
        _ = Moments().mean
