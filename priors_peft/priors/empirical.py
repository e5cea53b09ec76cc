"""Empirical prior: what prompts that were trained before, on other tasks or seeds, have in common."""

from typing import Literal

import torch
from torch import Tensor

from .base import Prior
from .low_rank import LowRankPrior, low_rank_root, principal_factors
from .task_posteriors import TaskPosteriors


class EmpiricalPrior(LowRankPrior):
    r"""p(θ_p) = N(θ_p; µ_p, Σ): the mean prompt, and a low-rank plus diagonal covariance shared by its tokens.

    See `LowRankPrior` for the form of Σ. This is the posterior predictive of the next prompt: Σ is widened by
    1 + 1/K, because the mean of K prompts is itself an estimate. Of prompts that are known by posteriors it is the law of
    the tasks behind them, see `TaskPosteriors`.

    Args:
        loc: Mean prompt µ, shape `[P, d]`.
        scale: Standard deviation of each coordinate outside the directions, shape `[d]`.
        directions: Orthonormal columns, shape `[d, r]`.
        stretch: Standard deviation along each direction in units of `scale`, shape `[r]`.
    """

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        reference: Tensor | TaskPosteriors,
        *,
        structure: Literal["low_rank", "mixture"] = "low_rank",
        rank: int = 16,
        scale: float | None = None,
    ) -> "EmpiricalPrior":
        """Fit to trained prompts.

        Args:
            reference: K prompts of P virtual tokens, shape `[K, P, d]`, or their posteriors, of which a mixture takes the
                means.
            structure: `"low_rank"`, or a `"mixture"` with one component a prompt, see `EmpiricalMixturePrior`.
            rank: Number of directions (low_rank); at most half of the (K − 1) P deviations.
            scale: Standard deviation around each prompt (mixture); by default from the distances between prompts.

        Raises:
            ValueError: A single prompt tells nothing of spread: it needs `structure="mixture"` and a `scale`.
        """
        posteriors = reference if isinstance(reference, TaskPosteriors) else None
        reference = reference.prompts if isinstance(reference, TaskPosteriors) else reference
        if not isinstance(reference, Tensor) or reference.ndim != 3 or 0 in reference.shape:
            got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
            raise ValueError(f"reference must be trained prompts of shape [K, P, d], got {got}")
        if not torch.isfinite(reference).all():
            raise ValueError("reference must be finite, got prompts with inf or nan: drop them")
        prompts = reference.detach().to("cpu", torch.float64)
        count, tokens, _ = prompts.shape
        if count < 2 and not (structure == "mixture" and scale is not None):
            raise ValueError(
                'reference must hold at least 2 prompts, got 1: with one take structure="mixture" and a scale'
            )
        if structure == "mixture":
            if scale is None:
                scale = _nearest_distance(prompts)
            return EmpiricalMixturePrior(prompts.float(), torch.tensor(float(scale)))
        if structure != "low_rank":
            raise ValueError(f'structure must be "low_rank" or "mixture", got {structure!r}')
        if posteriors is not None:
            return cls(*(part.float() for part in posteriors.fit(rank)))
        mean = prompts.mean(0)
        factor, diagonal = principal_factors((prompts - mean).flatten(0, 1), rank, (count - 1) * tokens)
        widening = 1 + 1 / count
        root = low_rank_root(factor * widening**0.5, diagonal * widening)
        return cls(mean.float(), *(part.float() for part in root))


class EmpiricalMixturePrior(EmpiricalPrior):
    r"""p(θ) = (1 / K) Σ_k Π_p N(θ_p; θ_kp, σ² I): near one of the K prompts, as a whole.

    The component is the prompt's, so its virtual tokens are not independent. Whitened by its moments, as the low-rank
    Gaussian with the mean prompt and the covariance averaged over virtual tokens.

    Args:
        prompts: θ_k, shape `[K, P, d]`.
        bandwidth: σ > 0, standard deviation around each prompt, shape `[]`.
    """

    is_gaussian = False
    prompts: Tensor
    bandwidth: Tensor

    def __init__(self, prompts: Tensor, bandwidth: Tensor) -> None:
        Prior.__init__(self)
        if prompts.ndim != 3 or not bandwidth > 0:
            raise ValueError(
                f"prompts must have shape [K, P, d] and scale be > 0, got {tuple(prompts.shape)} and "
                f"{float(bandwidth):.3g}"
            )
        self.register_buffer("prompts", prompts)
        self.register_buffer("bandwidth", bandwidth)
        self._derive()

    def _derive(self) -> None:
        prompts = self.prompts.double()
        count, tokens, dim = prompts.shape
        loc = prompts.mean(0)
        factor = (prompts - loc).flatten(0, 1).mT / (count * tokens) ** 0.5
        root = low_rank_root(factor, self.bandwidth.double().square().expand(dim))
        for name, value in zip(("loc", "scale", "directions", "stretch"), (loc, *root), strict=True):
            self.register_buffer(name, value.to(self.prompts), persistent=False)

    @property
    def distribution(self) -> torch.distributions.Distribution:
        """The distribution of a whole prompt, event shape `[P, d]`."""
        normal = torch.distributions.Normal(self.prompts, self.bandwidth, validate_args=False)
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones_like(self.prompts[:, 0, 0]), validate_args=False),
            torch.distributions.Independent(normal, 2, validate_args=False),
            validate_args=False,
        )

    def log_prob(self, prompt: Tensor) -> Tensor:
        return self.distribution.log_prob(self._checked(prompt))

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        noise = self._noise(num_virtual_tokens, generator)
        device = generator.device if generator is not None else self.loc.device
        chosen = int(torch.randint(len(self.prompts), (), generator=generator, device=device))
        return self.prompts[chosen] + noise * self.bandwidth


def _nearest_distance(prompts: Tensor) -> float:
    """Root mean square distance of a prompt to the nearest other, for each coordinate.

    The bandwidth of greatest leave-one-out likelihood where the nearest prompt dominates, as it does in thousands of
    dimensions.
    """
    rows = prompts.flatten(1)
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    return float(distances.min(-1).values.square().mean().div(rows.shape[1]).sqrt())
