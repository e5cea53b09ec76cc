"""Structured prior: a Gaussian with the reference's full covariance, shrunk so that it is always positive definite."""

from typing import Literal, Self

import torch
from torch import Tensor

from .base import Prior, check_reference


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
    def fit(cls, reference: Tensor, *, shrinkage: float | Literal["ledoit_wolf", "oas"] = "ledoit_wolf") -> Self:
        """Fit mean and covariance to a reference.

        The covariance is (1 − s) S + s (tr S / d) I, with S the empirical covariance.

        Args:
            reference: Shape `[n, d]`; fewer rows than dimensions still give a positive definite covariance.
            shrinkage: s in (0, 1], or how to choose it: Ledoit & Wolf (2004), or the oracle approximating shrinkage
                of Chen et al. (2010), both from scikit-learn.
        """
        from sklearn.covariance import ledoit_wolf, oas

        reference = check_reference(reference)
        mean = reference.mean(0)
        rows = (reference - mean).numpy()
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
        return cls(mean.float(), torch.linalg.cholesky(covariance).float())

    @property
    def distribution(self) -> torch.distributions.Distribution:
        return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
