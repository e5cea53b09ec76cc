"""Gaussian prior with independent coordinates: isotropic or diagonal, fixed or fitted."""

from typing import Self

import torch
from torch import Tensor

from .base import Prior, check_reference
from .moments import Moments


class GaussianPrior(Prior):
    r"""p(θ_p) = Π_i N(θ_pi; µ_i, σ_i²).

    Args:
        loc: Mean µ, shape `[d]`.
        scale: Standard deviation σ > 0, shape `[d]`.
    """

    is_gaussian = True
    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        if loc.shape != scale.shape or not bool((scale > 0).all()):
            raise ValueError(
                f"scale must be positive and of the shape of loc {tuple(loc.shape)}, got shape {tuple(scale.shape)} "
                f"with minimum {scale.min().item():.3g}"
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(
        cls,
        reference: Tensor | Moments,
        *,
        loc: float | None = None,
        scale: float | None = None,
        diagonal: bool = False,
    ) -> Self:
        """Fit mean and standard deviation to a reference.

        Args:
            reference: Shape `[n, d]`, or `Moments`; with `loc` and `scale` fixed only its width is used.
            loc: Fixed mean for every coordinate; fitted if None.
            scale: Fixed standard deviation; fitted if None. The embedding-priors paper uses `loc=0, scale=0.02`.
            diagonal: One fitted standard deviation a coordinate rather than one for all.
        """
        if scale is not None and scale <= 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        if isinstance(reference, Moments):
            centre, variance = reference.mean, reference.covariance.diagonal()
        else:
            reference = check_reference(reference)
            centre, variance = reference.mean(0), reference.var(0, correction=0)
        mean = centre if loc is None else torch.full_like(centre, loc)
        # About a fixed mean too, without a second copy of the reference.
        variance = variance + (centre - mean).square()
        if not diagonal:
            variance = variance.mean().expand_as(mean)
        deviation = variance.sqrt() if scale is None else torch.full_like(mean, scale)
        # A coordinate that never varies in the reference would have density zero everywhere else.
        floor = 1e-3 * deviation.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return cls(mean.float(), deviation.clamp_min(floor).float())

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        return torch.diag(self.scale)

    @property
    def distribution(self) -> torch.distributions.Distribution:
        normal = torch.distributions.Normal(self.loc, self.scale, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    # A is diagonal here: multiplying by σ costs d where the general case costs d².
    def to_prompt(self, z: Tensor) -> Tensor:
        return self.loc + z.to(self.loc.dtype) * self.scale

    def to_whitened(self, prompt: Tensor) -> Tensor:
        return (self._checked(prompt) - self.loc) / self.scale
