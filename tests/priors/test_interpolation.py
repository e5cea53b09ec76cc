"""The interpolation prior against integration by other means."""

import math

import numpy as np
import pytest
import torch
from prior_cases import reference
from scipy import integrate, stats

from priors_peft.priors import InterpolationPrior, StructuredPrior


@pytest.mark.parametrize("path", ["line", "great_circle"])
@pytest.mark.parametrize("concentration", [(1.0, 1.0), (2.0, 0.5)])
def test_quadrature_equals_adaptive_integration(path, concentration):
    a, b = reference(200, 3), reference(150, 3, 1) * 0.3 + 2
    prior = InterpolationPrior.fit((a, b), path=path, concentration=concentration)
    one, two = StructuredPrior.fit(a), StructuredPrior.fit(b)
    mean_a, mean_b = one.loc.double().numpy(), two.loc.double().numpy()
    cov_a, cov_b = ((p.scale_tril @ p.scale_tril.mT).double().numpy() for p in (one, two))
    angle = math.acos(mean_a @ mean_b / np.linalg.norm(mean_a) / np.linalg.norm(mean_b))

    def joint(alpha, token):
        first, second = alpha, 1 - alpha
        if path == "great_circle":
            first, second = math.sin(alpha * angle) / math.sin(angle), math.sin((1 - alpha) * angle) / math.sin(angle)
        normal = stats.multivariate_normal(first * mean_a + second * mean_b, first**2 * cov_a + second**2 * cov_b)
        return normal.pdf(token) * stats.beta(*concentration).pdf(alpha)

    for token in (a[0], b[0], prior.sample(1, torch.Generator().manual_seed(0))[0]):
        expected = integrate.quad(joint, 0, 1, args=(token.numpy(),), limit=200)[0]
        assert prior.log_prob(token[None]).item() == pytest.approx(math.log(expected), abs=2e-3)


@pytest.mark.parametrize("dim", [64, 2048])
def test_quadrature_resolves_the_posterior_of_alpha_in_high_dimension(dim):
    """There the posterior of α is as narrow as 1/√d; against 10,000 nodes."""
    generator = torch.Generator().manual_seed(0)
    ratios = torch.logspace(-2, 1, dim)
    prior = InterpolationPrior(
        torch.zeros(dim), torch.full((dim,), 0.2), torch.eye(dim), torch.eye(dim), ratios, torch.ones(2), torch.zeros(())
    )  # fmt: skip
    tokens = prior.sample(2, generator)
    alpha = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    y, lam = tokens.double(), ratios.double()
    expected = []
    for token in y:
        parts = []
        for chunk in alpha.split(2000):
            variance = chunk[:, None] ** 2 + (1 - chunk[:, None]) ** 2 * lam
            square = (token - 0.2 * (1 - chunk[:, None])).square() / variance
            parts.append(-0.5 * (square + variance.log() + math.log(2 * math.pi)).sum(-1))
        expected.append(torch.cat(parts).logsumexp(0) - math.log(len(alpha)))
    got = prior.log_prob(tokens[:, None])
    torch.testing.assert_close(got.double(), torch.stack(expected), atol=0.01, rtol=0)


def test_ends_of_the_path_are_the_references():
    a, b = reference(4000, 4), reference(4000, 4, 1) + 3
    near_a = InterpolationPrior.fit((a, b), concentration=(500.0, 0.5))
    np.testing.assert_allclose(near_a.loc, a.mean(0), atol=0.02)
    triangle = near_a.scale_tril
    np.testing.assert_allclose(triangle @ triangle.mT, np.cov(a.numpy().T), atol=0.1)


def test_great_circle_keeps_the_norm_that_the_line_loses():
    a, b = 0.1 * torch.randn(500, 8), 0.1 * torch.randn(500, 8)
    a[:, 0] += 5
    b[:, 1] += 5
    middle = {
        path: InterpolationPrior.fit((a, b), path=path, concentration=(400.0, 400.0)).loc.norm().item()
        for path in ("line", "great_circle")
    }
    assert middle["line"] == pytest.approx(5 / math.sqrt(2), rel=0.01)
    assert middle["great_circle"] == pytest.approx(5, rel=0.01)
