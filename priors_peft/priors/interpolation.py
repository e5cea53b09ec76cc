"""Interpolation prior: between two references, such as the activations of two tasks."""

import math
from typing import Literal, Self

import numpy as np
import torch
from scipy import special
from torch import Tensor

from .base import Prior, solve_rows
from .low_rank import low_rank_root, stretched
from .structured import Shrinkage, fit_moments


_MOST_NODES = 1024


class InterpolationPrior(Prior):
    r"""p(θ_p) = ∫ N(θ_p; a µ_a + b µ_b, a² Σ_a + b² Σ_b) Beta(α; β₁, β₂) dα, with weights (a, b) = (α, 1 − α).

    The density of e = a x + b y, x ~ N(µ_a, Σ_a), y ~ N(µ_b, Σ_b), α drawn for each virtual token. Along a great
    circle the weights are (sin αΩ, sin (1 − α)Ω) / sin Ω with Ω the angle between µ_a and µ_b (Shoemake, 1985).

    α is integrated out by Gauss quadrature in the Beta weight. Σ_a = LLᵀ and Σ_b = L Q diag(λ) Qᵀ Lᵀ are diagonal in
    the same basis L Q, so that all nodes together cost two products `[P, d] x [d, nodes]`.

    Whitened by its moments, in that basis: a diagonal plus the spread of the means along the path.

    Args:
        loc_a: µ_a, shape `[d]`.
        loc_b: µ_b, shape `[d]`.
        scale_tril_a: Cholesky factor L of Σ_a, lower triangular, shape `[d, d]`.
        rotation: Q, orthogonal, shape `[d, d]`.
        ratios: λ > 0, variances of b in units of those of a, shape `[d]`.
        concentration: (β₁, β₂) > 0, shape `[2]`.
        angle: Ω in [0, π), shape `[]`; 0 is the straight line.
    """

    loc_a: Tensor
    loc_b: Tensor
    scale_tril_a: Tensor
    rotation: Tensor
    ratios: Tensor
    concentration: Tensor
    angle: Tensor
    # What `_derive` adds.
    rest: Tensor
    pulls: Tensor
    precisions: Tensor
    scale: Tensor
    directions: Tensor
    stretch: Tensor

    def __init__(
        self,
        loc_a: Tensor,
        loc_b: Tensor,
        scale_tril_a: Tensor,
        rotation: Tensor,
        ratios: Tensor,
        concentration: Tensor,
        angle: Tensor,
    ) -> None:
        super().__init__()
        self.register_buffer("loc_a", loc_a)
        self.register_buffer("loc_b", loc_b)
        self.register_buffer("scale_tril_a", scale_tril_a)
        self.register_buffer("rotation", rotation)
        self.register_buffer("ratios", ratios)
        self.register_buffer("concentration", concentration)
        self.register_buffer("angle", angle)
        self._derive()

    @classmethod
    def fit(
        cls,
        reference: tuple[Tensor, Tensor],
        *,
        path: Literal["line", "great_circle"] = "line",
        concentration: tuple[float, float] = (1.0, 1.0),
        shrinkage: Shrinkage = "ledoit_wolf",
    ) -> Self:
        """Fit a Gaussian to each of two references.

        Args:
            reference: Two tensors `[n_a, d]` and `[n_b, d]`.
            path: From mean to mean along a straight line or along a great circle.
            concentration: (β₁, β₂) of α ~ Beta(β₁, β₂); (1, 1) is uniform. α = 1 is the first reference.
            shrinkage: See `fit_moments`.
        """
        if not isinstance(reference, (tuple, list)) or len(reference) != 2:
            raise ValueError(f"reference must be two tensors (a, b), got {type(reference).__name__}")
        if len(concentration) != 2 or not all(value > 0 for value in concentration):
            raise ValueError(f"concentration must be two numbers > 0, got {concentration!r}")
        if path not in ("line", "great_circle"):
            raise ValueError(f'path must be "line" or "great_circle", got {path!r}')
        (mean_a, covariance_a), (mean_b, covariance_b) = (fit_moments(part, shrinkage) for part in reference)
        if mean_a.shape != mean_b.shape:
            raise ValueError(f"reference must be two of one width, got {len(mean_a)} and {len(mean_b)}")
        angle = torch.zeros((), dtype=torch.float64)
        if path == "great_circle":
            angle = torch.nn.functional.cosine_similarity(mean_a, mean_b, dim=0).clamp(-1, 1).acos()
            if math.sin(angle) < 1e-3 and angle > 1:
                raise ValueError('path="great_circle" needs means that are not opposite: take path="line"')
        lower = torch.linalg.cholesky(covariance_a)
        half = torch.linalg.solve_triangular(lower, covariance_b, upper=False)
        ratios, rotation = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
        return cls(
            mean_a.float(),
            mean_b.float(),
            lower.float(),
            rotation.float(),
            ratios.clamp_min(1e-12).float(),
            torch.tensor(concentration, dtype=torch.float32),
            angle.float(),
        )

    def _weights(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        angle = float(self.angle)
        if angle == 0:
            return alpha, 1 - alpha
        return torch.sin(alpha * angle) / math.sin(angle), torch.sin((1 - alpha) * angle) / math.sin(angle)

    def _derive(self) -> None:
        means = torch.stack([self.loc_a, self.loc_b]).double()
        ratios, lower = self.ratios.double(), self.scale_tril_a.double()
        # Means in the shared basis, where Σ_a is the identity and Σ_b diag(λ).
        shared = solve_rows(lower, means) @ self.rotation.double()

        alpha, probability = self._quadrature(self._nodes(shared, ratios))
        weights = torch.stack(self._weights(alpha), dim=-1)
        mean = probability @ weights
        spread = (weights - mean).mT * probability @ (weights - mean)
        # Both weights may lie on one line; the root of their covariance exists all the same.
        values, vectors = torch.linalg.eigh(spread)
        factor = (shared.mT @ vectors) * values.clamp_min(0).sqrt()
        second = probability @ weights.square()
        root = low_rank_root(factor, second[0] + second[1] * ratios)

        # log N at a node is quadratic in the coordinates y about µ: −½ Σ y²/v + Σ y m/v + the rest.
        variances = weights.square() @ torch.stack([torch.ones_like(ratios), ratios])
        centres = (weights - mean) @ shared
        rest = probability.log() - 0.5 * (variances.log() + centres.square() / variances).sum(-1)
        rest -= lower.diagonal().log().sum() + 0.5 * self.loc_a.shape[0] * math.log(2 * math.pi)
        derived = {"loc": mean @ means, "precisions": variances.reciprocal(), "pulls": centres / variances}
        derived |= {"rest": rest} | dict(zip(("scale", "directions", "stretch"), root, strict=True))
        for name, value in derived.items():
            self.register_buffer(name, value.to(self.loc_a), persistent=False)

    def _nodes(self, shared: Tensor, ratios: Tensor) -> int:
        """Nodes that resolve the posterior of α: their spacing is at most its width, 1 / √(Fisher information)."""
        alpha = (1 - torch.cos(torch.linspace(0.005, math.pi - 0.005, 257, dtype=torch.float64))).to(ratios) / 2
        first, second = (weight[:, None] for weight in self._weights(alpha))
        variances = first.square() + second.square() * ratios
        step = alpha[1:] - alpha[:-1]
        drift = (first * shared[0] + second * shared[1]).diff(dim=0).square() / variances[1:]
        widening = 0.5 * variances.log().diff(dim=0).square()
        information = (drift + widening).sum(-1) / step.square()
        # Gauss nodes lie π √(α (1 − α)) / n apart.
        middle = (alpha[1:] + alpha[:-1]) / 2
        needed = math.pi * (middle * (1 - middle) * information).max().sqrt()
        return min(_MOST_NODES, max(32, math.ceil(1.5 * float(needed))))

    def _quadrature(self, nodes: int) -> tuple[Tensor, Tensor]:
        """Nodes α in (0, 1) and their probabilities: Gauss-Legendre for the uniform, Gauss-Jacobi for the Beta."""
        first, second = self.concentration.tolist()
        points, weights = special.roots_jacobi(nodes, second - 1, first - 1)
        alpha = torch.from_numpy((1 + points) / 2).to(self.loc_a.device)
        return alpha, torch.from_numpy(weights / weights.sum()).to(self.loc_a.device)

    def log_prob(self, prompt: Tensor) -> Tensor:
        shared = self._to_shared(prompt)
        nodes = self.rest + shared @ self.pulls.mT - 0.5 * shared.square() @ self.precisions.mT
        return torch.logsumexp(nodes, dim=-1).sum(-1)

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        noise = self._noise(num_virtual_tokens, generator)
        device = generator.device if generator is not None else self.loc.device
        uniform = torch.rand(num_virtual_tokens, generator=generator, device=device, dtype=torch.float64).cpu()
        alpha = torch.from_numpy(np.asarray(special.betaincinv(*self.concentration.tolist(), uniform.numpy())))
        first, second = (weight.to(noise)[:, None] for weight in self._weights(alpha))
        deviation = (first.square() + second.square() * self.ratios).sqrt()
        return first * self.loc_a + second * self.loc_b + self._from_shared(noise * deviation)

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        """Cholesky factor of the covariance, shape `[d, d]`, made on demand. `to_prompt` uses another root of it."""
        identity = torch.eye(self.dim, dtype=torch.float64, device=self.loc.device)
        root = stretched(identity, self.directions.double(), self.stretch.double()) * self.scale.double()
        root = root @ self.rotation.double().mT @ self.scale_tril_a.double().mT
        return torch.linalg.cholesky(root.mT @ root).to(self.loc)

    def to_prompt(self, z: Tensor) -> Tensor:
        z = z.to(self.loc.dtype)
        return self.loc + self._from_shared(stretched(z, self.directions, self.stretch) * self.scale)

    def to_whitened(self, prompt: Tensor) -> Tensor:
        return stretched(self._to_shared(prompt) / self.scale, self.directions, self.stretch.reciprocal())

    def _from_shared(self, shared: Tensor) -> Tensor:
        return shared @ self.rotation.mT @ self.scale_tril_a.mT

    def _to_shared(self, prompt: Tensor) -> Tensor:
        return solve_rows(self.scale_tril_a, self._checked(prompt) - self.loc) @ self.rotation
