"""A user's own prior: a torch distribution, or a subclass."""

import pytest
import torch
from prior_cases import laplace, reference
from torch import distributions as D

from priors_peft.priors import DistributionPrior, Prior, prior_family


def test_density_is_the_distributions():
    inner = D.MultivariateNormal(torch.ones(4), torch.eye(4) * 2)
    prior = DistributionPrior(inner)
    prompt = prior.sample(3)
    torch.testing.assert_close(prior.log_prob(prompt), inner.log_prob(prompt).sum())
    torch.testing.assert_close(prior.scale_tril, torch.eye(4) * 2**0.5)
    assert prior_family(prior) == "DistributionPrior"


def test_scale_is_the_standard_deviation_where_there_is_no_covariance():
    torch.testing.assert_close(laplace(4).scale_tril.diagonal(), 2**0.5 * torch.linspace(0.5, 2, 4))


def test_moving_the_prior_moves_the_distribution_but_not_the_users():
    inner = D.Independent(D.StudentT(torch.full((3,), 5.0), torch.zeros(3), torch.ones(3)), 1)
    prior = DistributionPrior(inner).double()
    assert prior.distribution.base_dist.df.dtype == torch.float64
    assert prior.log_prob(torch.zeros(2, 3)).dtype == torch.float64
    assert inner.base_dist.df.dtype == torch.float32
    mixed = D.MixtureSameFamily(D.Categorical(torch.ones(2)), D.Independent(D.Normal(torch.zeros(2, 3), 1.0), 1))
    assert DistributionPrior(mixed).double().log_prob(torch.zeros(2, 3)).dtype == torch.float64


def test_a_distribution_without_moments_says_what_to_do():
    flow = D.TransformedDistribution(D.Independent(D.Normal(torch.zeros(3), 1.0), 1), [D.TanhTransform()])
    with pytest.raises(ValueError, match="TransformedDistribution lacks: write a Prior subclass"):
        DistributionPrior(flow)


def test_fit_takes_the_distribution_as_it_is():
    inner = laplace(4).distribution
    assert DistributionPrior.fit(reference(9, 4), distribution=inner).dim == 4
    with pytest.raises(ValueError, match="reference's width 5, got 4"):
        DistributionPrior.fit(reference(9, 5), distribution=inner)


def test_it_cannot_be_rebuilt_from_tensors():
    with pytest.raises(ValueError, match="pass the distribution again"):
        DistributionPrior.from_state_dict(laplace(4).state_dict())


class HalfPrior(Prior):
    """A family of a user's: fifty lines would be plenty."""

    def __init__(self, loc: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc)

    @classmethod
    def fit(cls, reference: torch.Tensor) -> "HalfPrior":
        return cls(reference.mean(0))

    @property
    def scale_tril(self) -> torch.Tensor:
        return 0.5 * torch.eye(self.dim)

    @property
    def distribution(self) -> D.Distribution:
        return D.MultivariateNormal(self.loc, scale_tril=self.scale_tril)


def test_a_subclass_needs_only_its_density():
    prior = HalfPrior.fit(reference(9, 4))
    prompt = prior.sample(3, torch.Generator().manual_seed(0))
    assert torch.isfinite(prior.log_prob(prompt))
    torch.testing.assert_close(prior.to_prompt(prior.to_whitened(prompt)), prompt)
    assert torch.equal(HalfPrior.from_state_dict(prior.state_dict()).log_prob(prompt), prior.log_prob(prompt))
    assert prior_family(prior) == "HalfPrior"
