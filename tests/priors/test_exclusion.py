"""The exclusion priors: nothing inside, an exact law of the radius outside."""

import math

import numpy as np
import pytest
import torch
from prior_cases import reference
from scipy import stats

from priors_peft.priors import ExclusionPrior, RejectionPrior, StructuredPrior


def radii(prior, prompt):
    return torch.linalg.vector_norm(prior.double().to_whitened(prompt), dim=-1).numpy()


def in_dimension(dim, inner, scale):
    """A prior of a given region, with a triangle that mixes coordinates."""
    generator = torch.Generator().manual_seed(0)
    triangle = torch.randn(dim, dim, generator=generator).tril(-1) / dim + torch.linspace(0.1, 2, dim).diag()
    return ExclusionPrior(torch.randn(dim, generator=generator), triangle, torch.tensor(inner), torch.tensor(scale))


# In turn: all of it truncated, the bulk of the wide chi free, and a region so far out that Pr(χ_d > r₀) underflows.
@pytest.mark.parametrize("dim", [2, 64, 2048])
@pytest.mark.parametrize(("inner", "scale"), [(1.05, 1.0), (1.2, 1.5), (2.5, 1.2)])
def test_radius_is_the_truncated_chi_and_never_inside(dim, inner, scale):
    inner *= math.sqrt(dim)
    prior = in_dimension(dim, inner, scale)
    prompt = prior.sample(500, torch.Generator().manual_seed(0))
    assert torch.isfinite(prior.log_prob(prompt[:, None])).all()
    radius = radii(prior, prompt)
    assert radius.min() > inner * (1 - 1e-5)
    chi = stats.chi2(dim)
    start = chi.logsf((inner / scale) ** 2)
    if np.isfinite(start):
        log_survival = chi.logsf((radius / scale) ** 2) - start
        assert stats.kstest(-np.expm1(log_survival), "uniform").pvalue > 1e-3
    else:  # where scipy underflows: so far out the tail is an exponential
        rate = inner / scale**2 - (dim - 1) / inner
        assert (radius - inner).mean() == pytest.approx(1 / rate, rel=0.2)


def test_rounding_puts_no_draw_inside():
    """The whole prior is a shell of 1e-6 here, thinner than float32 can tell from the edge."""
    prior = in_dimension(64, 100.0, 0.01)
    assert torch.isfinite(prior.log_prob(prior.sample(1000, torch.Generator().manual_seed(0))))


def test_without_a_region_it_is_the_wider_gaussian():
    prior = in_dimension(5, 0.0, 1.5)
    prompt = prior.sample(4)
    wide = stats.multivariate_normal(prior.loc.numpy(), 1.5**2 * (prior.scale_tril @ prior.scale_tril.mT).numpy())
    assert prior.log_prob(prompt).item() == pytest.approx(wide.logpdf(prompt.numpy()).sum(), rel=1e-5)


def test_normalizer_is_the_mass_outside():
    prior = in_dimension(6, 3.0, 1.2)
    free = in_dimension(6, 0.0, 1.2)
    prompt = prior.sample(1, torch.Generator().manual_seed(0))
    expected = -stats.chi(6).logsf(3.0 / 1.2)
    assert (prior.log_prob(prompt) - free.log_prob(prompt)).item() == pytest.approx(expected, rel=1e-4)


def test_region_holds_the_references_quantile():
    rows = reference(2000, 10)
    prior = ExclusionPrior.fit(rows, quantile=0.9)
    assert torch.isinf(prior.log_prob(rows[:, None])).float().mean().item() == pytest.approx(0.9, abs=1e-3)
    shape = StructuredPrior.fit(rows)
    assert torch.equal(shape.loc, prior.loc) and torch.equal(shape.scale_tril, prior.scale_tril)


@pytest.mark.parametrize("method", ["radius", "rejection"])
def test_inside_is_impossible_and_the_gradient_leads_out(method):
    prior = ExclusionPrior.fit(reference(200, 4), method=method)
    z = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    prompt = prior.to_prompt(0.5 * prior.inner * z / z.norm()).requires_grad_()
    log_prob = prior.log_prob(prompt)
    assert log_prob.item() == -math.inf
    log_prob.backward()
    moved = prior.to_whitened(prompt.detach() + 1e-3 * prompt.grad).norm() - prior.to_whitened(prompt.detach()).norm()
    assert torch.isfinite(prompt.grad).all() and moved > 0


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "rate"), [(64, 0.1128), (2048, 0.0197)])
def test_rejection_accepts_as_often_as_it_says(dim, rate, caplog):
    prior = RejectionPrior(torch.zeros(dim), torch.eye(dim), torch.tensor(5.0))
    assert prior.acceptance_rate == pytest.approx(rate, abs=1e-3)
    # the rule itself, on proposals made here
    generator = torch.Generator().manual_seed(0)
    proposals = 5 ** (1 / dim) * torch.randn(20_000, dim, generator=generator, dtype=torch.float64)
    squares = proposals.square().sum(-1)
    ratio = 5 * torch.exp(-0.5 * squares * (1 - 5 ** (-2 / dim)))
    measured = (1 - ratio).clamp_min(0).mean().item()
    assert measured == pytest.approx(prior.acceptance_rate, rel=0.1)
    with caplog.at_level("INFO", "priors_peft"):
        prior.sample(5, torch.Generator().manual_seed(0))
    assert "accepted" in caplog.text and "proposals" in caplog.text


@pytest.mark.parametrize("dim", [2, 64])
def test_rejection_density_and_radius_are_the_papers(dim):
    prior = RejectionPrior(torch.zeros(dim), torch.eye(dim), torch.tensor(5.0)).double()
    prompt = prior.sample(400, torch.Generator().manual_seed(0))
    scale = 5 ** (1 / dim)
    wide, narrow = (stats.norm(0, width).logpdf(prompt.numpy()).sum(-1) for width in (scale, 1.0))
    expected = np.log(np.exp(wide - wide) - np.exp(narrow - wide)) + wide - np.log(prior.acceptance_rate)
    np.testing.assert_allclose(prior.log_prob(prompt[:, None]), expected, rtol=1e-5, atol=1e-3)

    chi, inner = stats.chi(dim), float(prior.inner)
    mass = lambda r: chi.cdf(r / scale) - chi.cdf(inner / scale) - chi.cdf(r) + chi.cdf(inner)  # noqa: E731
    assert stats.kstest(radii(prior, prompt), lambda r: mass(r) / prior.acceptance_rate).pvalue > 1e-3
