"""Linear regression with unit noise, whose posterior is known: every algorithm must find it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from priors_peft import PriorPromptEncoder
from priors_peft.inference.posterior import Posterior
from priors_peft.priors import StructuredPrior


@dataclass
class Toy:
    inputs: Tensor
    outputs: Tensor
    prior: StructuredPrior
    temperature: float

    @classmethod
    def make(cls, rows=20, width=4, temperature=1.0):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(rows, width, generator=generator)
        outputs = inputs @ torch.randn(width, generator=generator) + torch.randn(rows, generator=generator)
        mixing = torch.randn(width, width, generator=generator)
        scale_tril = torch.linalg.cholesky(mixing @ mixing.mT / width + torch.eye(width))
        return cls(inputs, outputs, StructuredPrior(torch.randn(width, generator=generator), scale_tril), temperature)

    def encoder(self, posterior: Posterior | None = None, seed=0):
        start = self.prior.sample(1, torch.Generator().manual_seed(seed))[None]
        return PriorPromptEncoder([self.prior], "whitened", start, posterior)

    @property
    def design(self):
        """Inputs in whitened coordinates, shape `[n, d]`."""
        return self.inputs @ self.prior.scale_tril

    def nll(self, prompt):
        """Negative log likelihood of all rows in nats, without its constant."""
        return 0.5 * (self.outputs - self.inputs @ prompt[0, 0]).square().sum()

    def loss(self, encoder):
        """What `PriorTrainer` minimizes, a row for a token."""
        prompts, log_prior = encoder(drawn=True)
        nll = torch.stack([self.nll(prompt) for prompt in prompts]).mean()
        return (nll - self.temperature * log_prior) / len(self.inputs)

    @property
    def mean(self):
        """Mean of the posterior in whitened coordinates, shape `[d]`."""
        residual = self.outputs - self.inputs @ self.prior.loc
        return self.covariance @ self.design.mT @ residual / self.temperature

    @property
    def covariance(self):
        """Covariance of the posterior in whitened coordinates, shape `[d, d]`."""
        width = self.inputs.shape[1]
        return torch.linalg.inv(self.design.mT @ self.design / self.temperature + torch.eye(width))

    @property
    def log_evidence(self):
        """log p(data) in nats, without the likelihood's constant."""
        residual = self.outputs - self.inputs @ self.prior.loc
        spread = self.design @ self.design.mT + torch.eye(len(residual))
        return -0.5 * (residual @ torch.linalg.solve(spread, residual) + spread.logdet()).item()


def moments(encoder, count=20_000):
    """Mean and covariance of draws from an encoder's posterior in whitened coordinates."""
    draws = encoder.posterior.sample(encoder.coordinate.detach(), count, torch.Generator().manual_seed(1)).flatten(1)
    return draws.mean(0), draws.T.cov()
