"""Structured prior: a Gaussian (or a mixture) with the reference's covariance, shrunk to be positive definite."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Prior, check_reference
from .moments import Moments


Shrinkage = float | Literal["ledoit_wolf", "oas"]


class StructuredPrior(Prior):
    r"""p(θ_p) = N(θ_p; µ, Σ) with Σ = AAᵀ.

    Args:
        loc: Mean µ, shape `[d]`.
        scale_tril: Cholesky factor A of the covariance, lower triangular, shape `[d, d]`.
    """

    is_gaussian = True
    root = "scale_tril"
    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        if scale_tril.shape != (*loc.shape, *loc.shape):
            raise ValueError(
                f"scale_tril must have shape [d, d] for loc of shape {tuple(loc.shape)}, got {tuple(scale_tril.shape)}"
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)

    @classmethod
    def fit(
        cls,
        reference: Tensor | Moments,
        *,
        structure: Literal["full", "low_rank", "block", "mixture"] = "full",
        **settings: Any,
    ) -> "StructuredPrior":
        """Fit mean and covariance to a reference.

        Args:
            reference: Shape `[n, d]`; fewer rows than dimensions still give a positive definite covariance.
            structure: `"full"` covariance, `"low_rank"` plus diagonal (never builds `[d, d]`), `"block"` diagonal, or
                a `"mixture"` of Gaussians.
            **settings: Of the structure. full: `shrinkage`, see `fit_moments`; low_rank: `rank`; block: `block_size`
                and `shrinkage`; mixture: `components`.
        """
        from .block import BlockPrior
        from .low_rank import LowRankPrior
        from .mixture import MixturePrior

        fits: dict[str, Callable[..., StructuredPrior]] = {
            "full": cls._fit_full,
            "low_rank": LowRankPrior.fit,
            "block": BlockPrior.fit,
            "mixture": MixturePrior.fit,
        }
        if structure not in fits:
            raise ValueError(f"structure must be one of {', '.join(fits)}, got {structure!r}")
        known = [name for name in inspect.signature(fits[structure]).parameters if name != "reference"]
        unknown = sorted(settings.keys() - set(known))
        if unknown:
            raise ValueError(f"structure={structure!r} takes {' and '.join(known)}, got {', '.join(unknown)}")
        return fits[structure](reference, **settings)

    @classmethod
    def _fit_full(cls, reference: Tensor | Moments, *, shrinkage: Shrinkage = "ledoit_wolf") -> "StructuredPrior":
        mean, covariance = fit_moments(reference, shrinkage)
        return cls(mean.float(), torch.linalg.cholesky(covariance).float())

    @property
    def distribution(self) -> torch.distributions.Distribution:
        return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)


def fit_moments(reference: Tensor | Moments, shrinkage: Shrinkage = "ledoit_wolf") -> tuple[Tensor, Tensor]:
    """Mean and covariance (1 − s) S + s (tr S / d) I in float64, with S the empirical covariance.

    Args:
        reference: Shape `[n, d]`, or streamed `Moments`.
        shrinkage: s in (0, 1], or how to choose it: Ledoit & Wolf (2004), or the oracle approximating shrinkage of
            Chen et al. (2010).
    """
    if shrinkage not in ("ledoit_wolf", "oas") and not (isinstance(shrinkage, (int, float)) and 0 < shrinkage <= 1):
        raise ValueError(f'shrinkage must be "ledoit_wolf", "oas" or a number in (0, 1], got {shrinkage!r}')
    if isinstance(reference, Moments):
        mean, covariance = reference.mean, reference.covariance
        chosen = _streamed_shrinkage(reference, shrinkage)
    else:
        from sklearn.covariance import empirical_covariance, ledoit_wolf_shrinkage, oas

        centred = check_reference(reference)
        mean = centred.mean(0)
        # Under the same name, so that of the wide float64 copies only one is held.
        centred = centred - mean
        rows = centred.numpy()
        covariance = torch.from_numpy(empirical_covariance(rows, assume_centered=True))
        if shrinkage == "ledoit_wolf":
            chosen = float(ledoit_wolf_shrinkage(rows, assume_centered=True))
        else:
            chosen = float(oas(rows, assume_centered=True)[1]) if shrinkage == "oas" else float(shrinkage)
    target = covariance.diagonal().mean()
    covariance = (1 - chosen) * covariance
    # With very many rows the chosen shrinkage goes to 0 and directions that the reference lacks would be lost.
    floor = 1e-6 * target.clamp_min(torch.finfo(torch.float32).tiny)
    covariance.diagonal().add_(chosen * target + floor)
    return mean, covariance


def _streamed_shrinkage(moments: Moments, shrinkage: Shrinkage) -> float:
    """scikit-learn's two formulas, which need rows there, from what a stream leaves."""
    if isinstance(shrinkage, (int, float)):
        return float(shrinkage)
    covariance, count = moments.covariance, moments.count
    dim = len(covariance)
    mean_variance = covariance.diagonal().mean()
    squares = covariance.square().sum()
    if shrinkage == "oas":
        above = squares / dim**2 + mean_variance**2
        below = (count + 1) * (squares / dim**2 - mean_variance**2 / dim)
        return float((above / below).clamp(max=1)) if below > 0 else 1.0
    spread = (squares - dim * mean_variance**2) / dim
    error = ((moments.fourth - squares) / (dim * count)).clamp(max=spread)
    return float(error / spread) if error > 0 else 0.0
