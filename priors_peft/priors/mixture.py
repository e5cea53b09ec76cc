"""Mixture structure: a reference of several clusters, each a Gaussian with its own mean and diagonal covariance."""

import warnings
from typing import Self

import torch
from torch import Tensor

from .base import Prior, check_reference
from .low_rank import PSEUDO_ROWS, LowRankPrior, low_rank_root


class MixturePrior(LowRankPrior):
    r"""p(θ_p) = Σ_k w_k N(θ_p; µ_k, diag(σ_k²)).

    Whitened by its moments, as the low-rank Gaussian with µ = Σ_k w_k µ_k and
    AAᵀ = diag(Σ_k w_k σ_k²) + Σ_k w_k (µ_k − µ)(µ_k − µ)ᵀ: no `[d, d]` is built.

    Args:
        weights: w > 0, summing to 1, shape `[K]`.
        locs: Means µ_k, shape `[K, d]`.
        scales: Standard deviations σ_k > 0, shape `[K, d]`.
    """

    is_gaussian = False
    weights: Tensor
    locs: Tensor
    scales: Tensor

    def __init__(self, weights: Tensor, locs: Tensor, scales: Tensor) -> None:
        Prior.__init__(self)
        if locs.shape != scales.shape or weights.shape != locs.shape[:1] or not bool((scales > 0).all()):
            raise ValueError(
                f"weights, locs and scales must have shapes [K], [K, d] and [K, d] and scales be positive, got "
                f"{tuple(weights.shape)}, {tuple(locs.shape)} and {tuple(scales.shape)} with minimum "
                f"{scales.min().item():.3g}"
            )
        self.register_buffer("weights", weights)
        self.register_buffer("locs", locs)
        self.register_buffer("scales", scales)
        self._derive()

    def _derive(self) -> None:
        weights, locs, scales = self.weights.double(), self.locs.double(), self.scales.double()
        weights = weights / weights.sum()
        loc = weights @ locs
        root = low_rank_root(((locs - loc) * weights.sqrt()[:, None]).mT, weights @ scales.square())
        for name, value in zip(("loc", "scale", "directions", "stretch"), (loc, *root), strict=True):
            self.register_buffer(name, value.to(self.locs), persistent=False)

    @classmethod
    def fit(cls, reference: Tensor, *, components: int = 8) -> Self:  # type: ignore[override]
        """Fit by expectation maximization from a k-means start (scikit-learn's `GaussianMixture`, seed 0).

        Args:
            reference: Shape `[n, d]`.
            components: Number of components K, at most n / 2. Those that end up with few rows borrow the spread of
                the others.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        reference = check_reference(reference)
        if not isinstance(components, int) or not 1 <= components <= len(reference) // 2:
            raise ValueError(f"components must be an integer in [1, {len(reference) // 2}], got {components!r}")
        floor = float(reference.var(0, correction=0).mean().clamp_min(torch.finfo(torch.float32).tiny))
        model = GaussianMixture(
            components, covariance_type="diag", reg_covar=1e-6 * floor, max_iter=50, random_state=0
        )
        with warnings.catch_warnings():
            # In thousands of dimensions memberships are settled long before the last digit of the bound is.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(reference.numpy())
        weights = torch.from_numpy(model.weights_)
        variances = torch.from_numpy(model.covariances_)
        rows = len(reference) * weights[:, None]
        shared = weights @ variances
        # Likewise a coordinate that no cluster varies in borrows from the others.
        shared = (len(reference) * shared + PSEUDO_ROWS * shared.mean()) / (len(reference) + PSEUDO_ROWS)
        variances = (rows * variances + PSEUDO_ROWS * shared) / (rows + PSEUDO_ROWS)
        return cls(weights.float(), torch.from_numpy(model.means_).float(), variances.sqrt().float())

    @property
    def distribution(self) -> torch.distributions.Distribution:
        normal = torch.distributions.Normal(self.locs, self.scales, validate_args=False)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(self.weights, validate_args=False),
            torch.distributions.Independent(normal, 1, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, prompt: Tensor) -> Tensor:
        return Prior.log_prob(self, prompt)

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        noise = self._noise(num_virtual_tokens, generator)
        weights = self.weights.to(generator.device) if generator is not None else self.weights
        chosen = torch.multinomial(weights, num_virtual_tokens, replacement=True, generator=generator)
        chosen = chosen.to(self.locs.device)
        return self.locs[chosen] + noise * self.scales[chosen]
