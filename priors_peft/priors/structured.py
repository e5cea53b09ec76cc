"""Structured prior: a Gaussian (or a mixture) with the reference's covariance, shrunk to be positive definite."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Prior, check_reference


Shrinkage = float | Literal["ledoit_wolf", "oas"]


class StructuredPrior(Prior):
    r"""p(θ_p) = N(θ_p; µ, Σ) with Σ = AAᵀ.

    Args:
        loc: Mean µ, shape `[d]`.
        scale_tril: Cholesky factor A of the covariance, lower triangular, shape `[d, d]`.
    """

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
        reference: Tensor,
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
    def _fit_full(cls, reference: Tensor, *, shrinkage: Shrinkage = "ledoit_wolf") -> "StructuredPrior":
        mean, covariance = fit_moments(reference, shrinkage)
        return cls(mean.float(), torch.linalg.cholesky(covariance).float())

    @property
    def distribution(self) -> torch.distributions.Distribution:
        return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)


def fit_moments(reference: Tensor, shrinkage: Shrinkage = "ledoit_wolf") -> tuple[Tensor, Tensor]:
    """Mean and covariance (1 − s) S + s (tr S / d) I in float64, with S the empirical covariance.

    Args:
        reference: Shape `[n, d]`.
        shrinkage: s in (0, 1], or how to choose it: Ledoit & Wolf (2004), or the oracle approximating shrinkage of
            Chen et al. (2010), both from scikit-learn.
    """
    from sklearn.covariance import ledoit_wolf, oas

    centred = check_reference(reference)
    mean = centred.mean(0)
    # Under the same name, so that of the wide float64 copies only one is held.
    centred = centred - mean
    rows = centred.numpy()
    if shrinkage == "ledoit_wolf" or shrinkage == "oas":
        covariance = {"ledoit_wolf": ledoit_wolf, "oas": oas}[shrinkage](rows, assume_centered=True)[0]
        covariance = torch.from_numpy(covariance)
    elif isinstance(shrinkage, (int, float)) and 0 < shrinkage <= 1:
        empirical = torch.from_numpy(rows.T @ rows / len(rows))
        target = empirical.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        covariance = (1 - shrinkage) * empirical + shrinkage * target
    else:
        raise ValueError(f'shrinkage must be "ledoit_wolf", "oas" or a number in (0, 1], got {shrinkage!r}')
    # With very many rows the chosen shrinkage goes to 0 and directions that the reference lacks would be lost.
    floor = 1e-6 * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    covariance.diagonal().add_(floor)
    return mean, covariance
