"""A user's own prior: any `torch.distributions.Distribution` of one virtual token."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from .base import Prior


class DistributionPrior(Prior):
    r"""p(θ_p) is the distribution's density, the same for each virtual token.

    Whitened by its moments: its mean, and its covariance where the distribution has one, else its standard deviation.

    A distribution object is not a set of tensors, so it isn't stored; only its location and scale are. To go on from
    a saved adapter, pass the distribution again.

    Args:
        distribution: Event shape `[d]` and no batch shape, with finite mean and variance.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        if len(distribution.event_shape) != 1 or distribution.batch_shape:
            raise ValueError(
                f"distribution must have event shape [d] and no batch shape, got {tuple(distribution.event_shape)} "
                f"and {tuple(distribution.batch_shape)}: wrap it in torch.distributions.Independent(distribution, 1)"
            )
        try:
            loc = distribution.mean
            covariance = getattr(distribution, "covariance_matrix", None)
            scale = distribution.stddev if covariance is None else torch.linalg.cholesky(covariance)
        except NotImplementedError as error:
            raise ValueError(
                f"distribution must have a mean and a variance, which {type(distribution).__name__} lacks: write a "
                "Prior subclass that says what its location and scale are"
            ) from error
        if not (torch.isfinite(loc).all() and torch.isfinite(scale).all()):
            raise ValueError(f"distribution must have a finite mean and variance, got {distribution}")
        # A copy, because moving the prior to another device moves it.
        self._distribution = copy.deepcopy(distribution)
        self.register_buffer("loc", loc.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    @classmethod
    def fit(cls, reference: Tensor, *, distribution: Distribution) -> Self:
        """The distribution as it is; of the reference only the width is used, to check it."""
        prior = cls(distribution)
        if reference.shape[-1] != prior.dim:
            raise ValueError(f"distribution must have the reference's width {reference.shape[-1]}, got {prior.dim}")
        return prior

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Self:
        raise ValueError("a torch distribution can't be rebuilt from tensors: pass the distribution again as prior=")

    @property
    def distribution(self) -> Distribution:
        return self._distribution

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        return self.scale if self.scale.ndim == 2 else torch.diag(self.scale)

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return self._distribution.sample(torch.Size([num_virtual_tokens]))
        # Distributions draw from the global generator only; it gets this one's seed for the draw, and its own back.
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        devices = [self.loc.device] if self.loc.device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            torch.manual_seed(seed)
            return self._distribution.sample(torch.Size([num_virtual_tokens]))

    def to_prompt(self, z: Tensor) -> Tensor:
        return super().to_prompt(z) if self.scale.ndim == 2 else self.loc + z.to(self.loc.dtype) * self.scale

    def to_whitened(self, prompt: Tensor) -> Tensor:
        diagonal = self.scale.ndim == 1
        return (self._checked(prompt) - self.loc) / self.scale if diagonal else super().to_whitened(prompt)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _move(self._distribution, fn)
        return super()._apply(fn, recurse)


def _move(part: Any, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply `fn` to the tensors of a distribution and of the distributions and transforms it is made of."""
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            vars(part)[name] = fn(value)
        elif isinstance(value, (Distribution, Transform)):
            _move(value, fn)
        elif isinstance(value, list):
            for item in value:
                _move(item, fn)


def own_prior(prior: Prior | Distribution) -> Prior:
    """A copy of a user's prior; a torch distribution of one virtual token becomes one."""
    if isinstance(prior, Distribution):
        return DistributionPrior(prior)
    return copy.deepcopy(prior)
