"""Exclusion prior: mass outside the region that the reference fills."""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .base import Prior, solve_rows
from .chi import log_survival, radius_beyond
from .moments import Moments
from .structured import StructuredPrior


class ExclusionPrior(Prior):
    r"""p(θ_p) = N(θ_p; µ, s² Σ) / Pr(χ_d > r₀ / s) where r > r₀, and 0 elsewhere; r² = (θ_p − µ)ᵀ Σ⁻¹ (θ_p − µ).

    The density depends on the Mahalanobis radius r only. The direction is uniform on the ellipsoid, and r / s follows
    a chi distribution of d degrees truncated below at r₀ / s; both are sampled exactly, in any dimension.

    µ and Σ = AAᵀ are the reference's; the covariance of a virtual token is Σ times `variance`.

    Inside the region `log_prob` is −inf, exactly. Its derivative does not exist there; the gradient it gives points
    out: that of the density mirrored at the edge. A prompt that training carries inside is so led back, where a
    gradient of 0 would leave it. Never multiply −inf by a weight of 0: leave the term out.

    Args:
        loc: Mean µ of the reference, shape `[d]`.
        scale_tril: Cholesky factor A of the reference's covariance, lower triangular, shape `[d, d]`.
        inner: Radius r₀ >= 0 of the excluded region in the reference's standard deviations, shape `[]`.
        scale: s > 0, how much wider than the reference the prior is, shape `[]`.
    """

    loc: Tensor
    scale_tril: Tensor
    inner: Tensor
    scale: Tensor
    variance: float
    """E r² / d: the covariance of a virtual token in units of Σ."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, inner: Tensor, scale: Tensor) -> None:
        super().__init__()
        if scale_tril.shape != (*loc.shape, *loc.shape):
            raise ValueError(
                f"scale_tril must have shape [d, d] for loc of shape {tuple(loc.shape)}, got {tuple(scale_tril.shape)}"
            )
        if not (inner >= 0 and scale > 0):
            raise ValueError(f"inner must be >= 0 and scale > 0, got {float(inner)} and {float(scale)}")
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.register_buffer("inner", inner)
        self.register_buffer("scale", scale)
        self._derive()

    def _derive(self) -> None:
        # From the buffers as they are stored, so that the edge is the same number for the density and the draws.
        dim, inner, scale = self.dim, float(self.inner), float(self.scale)
        log_mass = log_survival(dim, inner / scale)[0]
        # E r² = s² d Q(d/2 + 1, x) / Q(d/2, x) for the truncated chi.
        self.variance = scale**2 * math.exp(log_survival(dim + 2, inner / scale)[0] - log_mass)
        self._constant = -0.5 * dim * math.log(2 * math.pi * scale**2) - float(log_mass)

    @classmethod
    def fit(
        cls,
        reference: Tensor | Moments,
        *,
        method: Literal["radius", "rejection"] = "radius",
        scale: float = 1.5,
        quantile: float = 0.99,
        c: float = 5.0,
    ) -> "ExclusionPrior":
        """Fit the region to a reference: its mean, its Ledoit-Wolf covariance and a quantile of its radii.

        Args:
            reference: Shape `[n, d]`.
            method: `"radius"` is the density above; `"rejection"` the paper's own rule, see `RejectionPrior`.
            scale: s > 0, how much wider than the reference the prior is (radius).
            quantile: Share of the reference inside the excluded region, in [0, 1] (radius).
            c: Ratio of the volumes of proposal and reference, > 1 (rejection).
        """
        from .rejection import RejectionPrior

        # The region is an ellipsoid of the full structured prior.
        shape = StructuredPrior.fit(reference)
        if method == "rejection":
            return RejectionPrior(shape.loc, shape.scale_tril, torch.tensor(float(c)))
        if method != "radius":
            raise ValueError(f'method must be "radius" or "rejection", got {method!r}')
        if not 0 <= quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1], got {quantile!r}")
        if not scale > 0:
            raise ValueError(f"scale must be > 0, got {scale!r}")
        # The reference's own radii and not chi's: real vectors have heavier tails (a quarter of SmolLM2's vocabulary
        # lies beyond chi's 0.99).
        lower, mean = shape.scale_tril.double(), shape.loc.double()
        rows = reference.sample if isinstance(reference, Moments) else reference
        pieces = (solve_rows(lower, piece.detach().to(mean) - mean) for piece in rows.split(4096))
        radii = torch.cat([torch.linalg.vector_norm(piece, dim=-1) for piece in pieces]).numpy()
        inner = torch.tensor(float(np.quantile(radii, quantile)))
        return cls(shape.loc, shape.scale_tril, inner, torch.tensor(float(scale)))

    def log_prob(self, prompt: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(self.to_whitened(prompt), dim=-1)
        inside = radius < self.inner
        mirrored = torch.where(inside, 2 * self.inner - radius, radius)
        wall = torch.zeros_like(radius).masked_fill(inside, -math.inf)
        return (self._log_density(mirrored) - self.scale_tril.diagonal().log().sum() + wall).sum(-1)

    def _log_density(self, radius: Tensor) -> Tensor:
        """Log density of the whitened virtual token at a radius outside the region."""
        return self._constant - 0.5 * (radius / self.scale).square()

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        direction = torch.nn.functional.normalize(self._noise(num_virtual_tokens, generator).double(), dim=-1)
        device = generator.device if generator is not None else self.loc.device
        uniform = 1 - torch.rand(num_virtual_tokens, generator=generator, device=device, dtype=torch.float64).cpu()
        inner, scale = float(self.inner), float(self.scale)
        radius = scale * torch.from_numpy(radius_beyond(self.dim, inner / scale, uniform.numpy()))
        return self._outside((direction * radius.to(direction.device)[:, None]).to(self.loc))

    def _outside(self, z: Tensor) -> Tensor:
        """The prompt at whitened coordinates z; a draw that rounding has put inside is moved out by that much."""
        prompt = self.to_prompt(z)
        while True:
            inside = torch.linalg.vector_norm(self.to_whitened(prompt), dim=-1) < self.inner
            if not bool(inside.any()):
                return prompt
            z = torch.where(inside[:, None], z * (1 + 1e-6), z)
            prompt = self.to_prompt(z)
