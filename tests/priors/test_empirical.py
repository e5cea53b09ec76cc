"""The empirical prior: what a population of prompts has in common."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from priors_peft.priors import EmpiricalPrior


def population(count, tokens=4, dim=10):
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(tokens, dim, generator=generator)
    factor = 2 * torch.randn(2, dim, generator=generator)
    return (
        centre,
        factor,
        centre
        + torch.randn(count, tokens, 2, generator=generator) @ factor
        + 0.5 * torch.randn(count, tokens, dim, generator=generator),
    )


def test_low_rank_finds_the_population():
    centre, factor, prompts = population(2000)
    prior = EmpiricalPrior.fit(prompts, rank=2)
    torch.testing.assert_close(prior.loc, centre, atol=0.3, rtol=0)
    covariance = prior.scale_tril @ prior.scale_tril.mT
    torch.testing.assert_close(covariance, factor.mT @ factor + 0.25 * torch.eye(10), atol=0.5, rtol=0.05)


def test_few_prompts_are_widened_by_the_doubt_about_their_mean():
    _, _, prompts = population(3)
    prior = EmpiricalPrior.fit(prompts, rank=2)
    deviations = (prompts - prompts.mean(0)).flatten(0, 1)
    expected = (1 + 1 / 3) * deviations.square().sum() / (2 * 4)
    assert (prior.scale_tril @ prior.scale_tril.mT).trace().item() == pytest.approx(expected.item(), rel=1e-4)


def test_mixture_is_one_gaussian_a_prompt():
    _, _, prompts = population(6)
    prior = EmpiricalPrior.fit(prompts, structure="mixture", scale=0.3)
    prompt = prior.sample(4, torch.Generator().manual_seed(0))
    parts = [stats.norm(centre.numpy(), 0.3).logpdf(prompt.numpy()).sum() for centre in prompts]
    assert prior.log_prob(prompt).item() == pytest.approx(special.logsumexp(parts) - math.log(6), rel=1e-5)
    # A draw is near one prompt as a whole, never a patchwork of several.
    nearest = [torch.cdist(prompts[:, p], prompt[p : p + 1]).argmin().item() for p in range(4)]
    assert len(set(nearest)) == 1


def test_default_bandwidth_is_the_best_by_leave_one_out_in_high_dimension():
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, 3, 400, generator=generator)
    # Four tasks of two seeds each: a prompt's nearest is the task's other seed.
    prompts = torch.cat([prompts, prompts + 0.3 * torch.randn(4, 3, 400, generator=generator)])
    fitted = EmpiricalPrior.fit(prompts, structure="mixture").bandwidth.item()

    def left_out(scale):
        return sum(
            EmpiricalPrior.fit(torch.cat([prompts[:k], prompts[k + 1 :]]), structure="mixture", scale=scale).log_prob(
                prompts[k]
            )
            for k in range(8)
        ).item()

    assert left_out(fitted) > max(left_out(0.9 * fitted), left_out(1.1 * fitted))


def test_one_prompt_makes_a_mixture_of_one():
    _, _, prompts = population(1)
    prior = EmpiricalPrior.fit(prompts, structure="mixture", scale=0.1)
    expected = stats.norm(0, 0.1).logpdf(np.zeros(40)).sum()
    assert prior.log_prob(prompts[0]).item() == pytest.approx(expected, rel=1e-5)
