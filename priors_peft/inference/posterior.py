"""What is known of a prompt beyond a point: how coordinates z spread about the encoder's own, m."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


# An optimizer's step on log s as a share of its step on m: a scale has a few nats to go, m some standard deviations.
SCALE_RATE = 0.2


class GaussianPosterior(nn.Module):
    r"""q(z) = N(m, diag(s²) + FᵀF), with m the encoder's coordinate.

    Args:
        rho: log s / 0.2, shape `[S, P, d]`, so that an optimizer whose steps suit m suits s too.
        factor: F, shape `[r, S, P, d]`; r = 0 where coordinates are independent.
        trained: Whether both are parameters, or were found after training.
    """

    rho: Tensor
    factor: Tensor

    def __init__(self, rho: Tensor, factor: Tensor, trained: bool) -> None:
        super().__init__()
        if factor.shape[1:] != rho.shape:
            raise ValueError(f"factor must have shape [r, *{list(rho.shape)}], got {list(factor.shape)}")
        for name, value in (("rho", rho), ("factor", factor)):
            # No parameter without elements: what gathers gradients stumbles over it.
            if trained and value.numel():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @classmethod
    def of_scale(cls, scale: Tensor, factor: Tensor | None = None, trained: bool = False) -> "GaussianPosterior":
        """Of standard deviations s `[S, P, d]` and, where there are any, directions F `[r, S, P, d]`."""
        factor = scale.new_zeros(0, *scale.shape) if factor is None else factor
        return cls(scale.log() / SCALE_RATE, factor, trained)

    @property
    def log_scale(self) -> Tensor:
        """log s, shape `[S, P, d]`."""
        return self.rho * SCALE_RATE

    def variance(self, mean: Tensor) -> Tensor:
        """Variance of each coordinate, shape `[S, P, d]`."""
        return (2 * self.log_scale).exp() + self.factor.square().sum(0)

    def parts(self, mean: Tensor) -> "list[tuple[Tensor, GaussianPosterior]]":
        """The Gaussians that it is made of, with their means `[S, P, d]`."""
        return [(mean, self)]

    def sample(self, mean: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws of z about `mean` `[S, P, d]`, shape `[count, S, P, d]`."""
        noise = _noise((count, *mean.shape), generator, mean) * self.log_scale.exp()
        if len(self.factor):
            noise = noise + torch.tensordot(_noise((count, len(self.factor)), generator, mean), self.factor, 1)
        return mean + noise

    def scale_by(self, factor: Tensor) -> None:
        """Multiply z by `factor`, shape `[S, 1, 1]`, in place."""
        self.rho.data += factor.log() / SCALE_RATE
        self.factor.data *= factor

    def entropy(self) -> Tensor:
        """Differential entropy of q(z), in nats."""
        flat, log_scale = self.factor.flatten(1), self.log_scale.flatten()
        scaled = flat * (-log_scale).exp()
        inner = torch.eye(len(flat), device=flat.device) + scaled @ scaled.mT
        return log_scale.numel() / 2 * math.log(2 * math.pi * math.e) + log_scale.sum() + inner.logdet() / 2


class MixturePosterior(nn.Module):
    """Gaussians of equal weight, the first about the encoder's coordinate.

    Args:
        gaussians: All of them.
        means: z about which those after the first lie, shape `[C - 1, S, P, d]`.
        trained: Whether all are parameters.
    """

    means: Tensor

    def __init__(self, gaussians: Sequence[GaussianPosterior], means: Tensor, trained: bool) -> None:
        super().__init__()
        expected, shapes = (
            [len(gaussians) - 1, *gaussians[0].rho.shape],
            {gaussian.rho.shape for gaussian in gaussians},
        )
        if list(means.shape) != expected or len(shapes) > 1:
            raise ValueError(
                f"means must have shape {expected}, and every rho {expected[1:]}, got {list(means.shape)}"
            )
        self.gaussians = nn.ModuleList(gaussians)
        if trained:
            self.means = nn.Parameter(means)
        else:
            self.register_buffer("means", means)

    def parts(self, mean: Tensor) -> list[tuple[Tensor, Any]]:
        """The Gaussians that it is made of, with their means `[S, P, d]`; that of the first is `mean`."""
        return list(zip([mean, *self.means], self.gaussians, strict=True))

    def mean(self, mean: Tensor) -> Tensor:
        """Its own mean, shape `[S, P, d]`."""
        return torch.stack([center for center, _ in self.parts(mean)]).mean(0)

    def variance(self, mean: Tensor) -> Tensor:
        """Variance of each coordinate, within the Gaussians and between them, shape `[S, P, d]`."""
        parts = self.parts(mean)
        within = torch.stack([gaussian.variance(center) for center, gaussian in parts]).mean(0)
        return within + torch.stack([center for center, _ in parts]).var(0, correction=0)

    def sample(self, mean: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws of z, shape `[count, S, P, d]`; of each Gaussian one before there is another of any."""
        parts = self.parts(mean)
        device = mean.device if generator is None else generator.device
        order = [
            index for _ in range(-(-count // len(parts))) for index in _permutation(len(parts), generator, device)
        ]
        chosen = [parts[index] for index in order[:count]]
        return torch.cat([gaussian.sample(center, 1, generator) for center, gaussian in chosen])

    def scale_by(self, factor: Tensor) -> None:
        """Multiply z by `factor`, shape `[S, 1, 1]`, in place."""
        self.means.data *= factor
        for gaussian in self.gaussians:
            gaussian.scale_by(factor)  # type: ignore[operator]


class DirectionalPosterior(nn.Module):
    """A Gaussian about m that is as wide as the prior, but for some directions.

    Args:
        directions: Orthonormal, shape `[r, S, P, d]`.
        scale: Standard deviation in each, shape `[r]`.
        rest: Standard deviation in all others, shape `[]`.
    """

    directions: Tensor
    scale: Tensor
    rest: Tensor

    def __init__(self, directions: Tensor, scale: Tensor, rest: Tensor) -> None:
        super().__init__()
        for name, value in (("directions", directions), ("scale", scale), ("rest", rest)):
            self.register_buffer(name, value)

    def scale_by(self, factor: Tensor) -> None:
        """Multiply z by `factor`, shape `[S, 1, 1]`, the same for all layers, in place."""
        self.scale *= factor.flatten()[0]
        self.rest *= factor.flatten()[0]

    def variance(self, mean: Tensor) -> Tensor:
        """Variance of each coordinate, shape `[S, P, d]`."""
        change = self.scale.square() - self.rest.square()
        return self.rest.square() + torch.tensordot(change, self.directions.square(), 1)

    def sample(self, mean: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` draws of z about `mean` `[S, P, d]`, shape `[count, S, P, d]`."""
        noise = _noise((count, *mean.shape), generator, mean)
        along = noise.flatten(1) @ self.directions.flatten(1).mT
        return mean + self.rest * noise + torch.tensordot(along * (self.scale - self.rest), self.directions, 1)


class SampledPosterior(nn.Module):
    """Draws of z, shape `[K, S, P, d]`; the encoder's coordinate is their mean."""

    draws: Tensor

    def __init__(self, draws: Tensor) -> None:
        super().__init__()
        self.register_buffer("draws", draws)

    def variance(self, mean: Tensor) -> Tensor:
        """Variance of each coordinate that the draws are a sample of, their mean being `mean`, shape `[S, P, d]`."""
        return (self.draws - mean).square().sum(0) / max(1, len(self.draws) - 1)

    def sample(self, mean: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` of the draws, shape `[count, S, P, d]`; each once before any comes again."""
        device = self.draws.device if generator is None else generator.device
        rounds = -(-count // len(self.draws))
        order = [index for _ in range(rounds) for index in _permutation(len(self.draws), generator, device)]
        return self.draws[order[:count]]


Posterior = GaussianPosterior | MixturePosterior | DirectionalPosterior | SampledPosterior


def posterior_from(state: dict[str, Tensor], trained: bool) -> Posterior | None:
    """The posterior whose `state_dict()` this is, None of an empty one.

    Raises:
        ValueError: It is not one's.
    """
    if not state:
        return None
    if state.keys() == {"draws"}:
        return SampledPosterior(state["draws"])
    if state.keys() == {"directions", "scale", "rest"}:
        return DirectionalPosterior(state["directions"], state["scale"], state["rest"])
    if state.keys() == {"rho", "factor"}:
        return GaussianPosterior(state["rho"], state["factor"], trained)
    if "means" in state:
        count = len(state["means"]) + 1
        keys = [(f"gaussians.{index}.rho", f"gaussians.{index}.factor") for index in range(count)]
        if state.keys() == {"means", *(key for pair in keys for key in pair)}:
            gaussians = [GaussianPosterior(state[rho], state[factor], trained) for rho, factor in keys]
            return MixturePosterior(gaussians, state["means"], trained)
    raise ValueError(f"a posterior must hold draws, or rho and factor, or directions, got {', '.join(sorted(state))}")


def _permutation(count: int, generator: torch.Generator | None, device: torch.device) -> list[int]:
    return torch.randperm(count, generator=generator, device=device).tolist()


def _noise(shape: tuple[int, ...], generator: torch.Generator | None, like: Tensor) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(like)
