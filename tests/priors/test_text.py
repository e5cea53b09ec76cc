"""The text prior, and PEFT's `TEXT` initialization as its limit."""

import pytest
import torch
from prior_cases import reference

from priors_peft.priors import GaussianPrior, TextPrior


ROWS = reference(200, 6)


@pytest.mark.parametrize(("tokens", "expected"), [(2, [0, 1]), (3, [0, 1, 2]), (7, [0, 1, 2, 0, 1, 2, 0])])
def test_tokens_are_trimmed_or_cycled(tokens, expected):
    prior = TextPrior.fit(ROWS, token_embeddings=ROWS[:3], num_virtual_tokens=tokens)
    assert torch.equal(prior.loc, ROWS[expected])


def test_spread_0_is_the_text_itself():
    prior = TextPrior.fit(ROWS, token_embeddings=ROWS[:3], num_virtual_tokens=5, spread=0)
    assert torch.equal(prior.sample(5), prior.loc)
    with pytest.raises(ValueError, match="spread 0 has no density: set spread > 0, or prior_weight=0"):
        prior.log_prob(prior.loc)
    # It can be trained in whitened coordinates, the reference's.
    z = torch.ones(5, 6)
    torch.testing.assert_close(prior.to_prompt(z), prior.loc + GaussianPrior.fit(ROWS).scale)
    torch.testing.assert_close(prior.to_whitened(prior.to_prompt(z)), z)
    assert TextPrior.from_state_dict(prior.state_dict()).is_point


@pytest.mark.parametrize("covariance", ["isotropic", "full"])
def test_spread_scales_the_references_covariance(covariance):
    fit = {"token_embeddings": ROWS[:3], "num_virtual_tokens": 3, "covariance": covariance}
    half, one = (TextPrior.fit(ROWS, spread=spread, **fit) for spread in (0.5, 1.0))
    torch.testing.assert_close(half.scale_tril, 0.5 * one.scale_tril)
    expected = torch.cov(ROWS.mT).trace()
    torch.testing.assert_close((one.scale_tril @ one.scale_tril.mT).trace(), expected, rtol=0.01, atol=0)


def test_a_small_spread_stays_nearest_to_its_tokens():
    vocabulary = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    prior = TextPrior.fit(vocabulary, token_embeddings=vocabulary[7:12], num_virtual_tokens=5)
    nearest = torch.cdist(prior.sample(5, torch.Generator().manual_seed(0)), vocabulary).argmin(-1)
    assert nearest.tolist() == [7, 8, 9, 10, 11]
