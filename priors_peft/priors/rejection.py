"""The paper's own exclusion rule, by rejection; kept for reproduction."""

import logging
import math

import torch
from torch import Tensor

from .base import Prior
from .chi import log_survival
from .exclusion import ExclusionPrior


logger = logging.getLogger(__name__)


class RejectionPrior(ExclusionPrior):
    r"""p(θ_p) = max(0, q(θ_p) − N(θ_p; µ, Σ)) / Z with the proposal q = N(µ, c^(2/d) Σ).

    The paper's exclusion rule: draw from q, accept with probability max(0, 1 − N(θ; µ, Σ) / q(θ)). Its normalizer Z,
    which is the acceptance rate too, has a closed form, so `log_prob` is exact: with s = c^(1/d) and
    r₀² = 2 ln c / (1 − s⁻²), Z = Pr(χ_d > r₀ / s) − Pr(χ_d > r₀).

    For reproduction: in high dimension little is accepted (2 % at d = 2048 and c = 5), and what is lies in a shell
    only s wider than the reference. `ExclusionPrior` gives the mass outside that this rule is after.

    Args:
        loc: Mean µ of the reference, shape `[d]`.
        scale_tril: Cholesky factor A of the reference's covariance, lower triangular, shape `[d, d]`.
        volume: c > 1, ratio of the volumes of proposal and reference, shape `[]`.
    """

    volume: Tensor
    acceptance_rate: float
    """Z, the share of proposals that the rule accepts."""

    def __init__(self, loc: Tensor, scale_tril: Tensor, volume: Tensor) -> None:
        Prior.__init__(self)
        if not volume > 1:
            raise ValueError(f"c must be > 1, got {float(volume)}: at 1 proposal and reference are the same")
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.register_buffer("volume", volume)
        self._derive()

    def _derive(self) -> None:
        dim, log_volume = self.dim, math.log(float(self.volume))
        scale = math.exp(log_volume / dim)
        # 1 − s⁻² without the digits it would lose in high dimension.
        self._contrast = -math.expm1(-2 * log_volume / dim)
        inner = math.sqrt(2 * log_volume / self._contrast)
        self.register_buffer("inner", torch.tensor(inner).to(self.loc), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).to(self.loc), persistent=False)

        def mass(degrees: int, width: float) -> float:
            return math.exp(log_survival(degrees, inner / width)[0])

        self.acceptance_rate = mass(dim, scale) - mass(dim, 1.0)
        self.variance = (scale**2 * mass(dim + 2, scale) - mass(dim + 2, 1.0)) / self.acceptance_rate
        self._constant = -0.5 * dim * math.log(2 * math.pi * scale**2) - math.log(self.acceptance_rate)

    def _log_density(self, radius: Tensor) -> Tensor:
        accepted = -torch.expm1(self._log_ratio(radius))
        return super()._log_density(radius) + accepted.clamp_min(torch.finfo(radius.dtype).tiny).log()

    def _log_ratio(self, radius: Tensor) -> Tensor:
        """log N(θ; µ, Σ) / q(θ)."""
        return self.volume.log() - 0.5 * self._contrast * radius.square()

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        device = generator.device if generator is not None else self.loc.device
        accepted, count, tried = [], 0, 0
        while count < num_virtual_tokens:
            z = self._noise(256, generator) * self.scale
            uniform = torch.rand(len(z), generator=generator, device=device, dtype=torch.float64).to(self.loc)
            accepted.append(z[uniform < -torch.expm1(self._log_ratio(torch.linalg.vector_norm(z, dim=-1)))])
            count, tried = count + len(accepted[-1]), tried + len(z)
        logger.info(f"accepted {count} of {tried} proposals, {count / tried:.2%}; exactly {self.acceptance_rate:.2%}")
        return self._outside(torch.cat(accepted)[:num_virtual_tokens])
