"""The Gaussian prior against scipy."""

import numpy as np
import pytest
import torch
from prior_cases import reference
from scipy import stats

from priors_peft.priors import GaussianPrior


def test_fixed_is_what_was_asked_for():
    prior = GaussianPrior.fit(reference(10, 5), loc=0.0, scale=0.02)
    prompt = prior.sample(4, torch.Generator().manual_seed(0))
    expected = stats.norm(0, 0.02).logpdf(prompt.numpy()).sum()
    assert prior.log_prob(prompt).item() == pytest.approx(expected, rel=1e-5)


def test_fitted_has_the_references_moments():
    rows = reference(500, 5)
    diagonal, isotropic = GaussianPrior.fit(rows, diagonal=True), GaussianPrior.fit(rows)
    np.testing.assert_allclose(diagonal.loc, rows.numpy().mean(0), rtol=1e-5)
    np.testing.assert_allclose(diagonal.scale, rows.numpy().std(0), rtol=1e-5)
    np.testing.assert_allclose(isotropic.scale, np.sqrt(rows.numpy().var(0).mean()).repeat(5), rtol=1e-5)
    expected = stats.multivariate_normal(rows.numpy().mean(0), np.diag(rows.numpy().var(0))).logpdf(rows[:4]).sum()
    assert diagonal.log_prob(rows[:4]).item() == pytest.approx(expected, rel=1e-5)
