"""Text prior: a prompt that stays near the tokens of a description in plain English."""

from typing import Literal, Self

import torch
from torch import Tensor

from .base import Prior
from .gaussian import GaussianPrior
from .structured import fit_moments


class TextPrior(Prior):
    r"""p(θ_p) = N(θ_p; e_p, ε² Σ), with e_p the p-th token of the description and Σ the reference's covariance.

    A spread ε of 0 is PEFT's `TEXT` initialization: `sample` gives the tokens exactly, and there is no density, so
    `log_prob` raises and the prior weight must be 0. The whitened coordinates are then in the reference's own
    standard deviations, in which such a prompt can still be trained.

    Args:
        loc: Embeddings e of the description's tokens, shape `[P, d]`.
        scale: Standard deviation ε σ > 0 of every coordinate, shape `[]`, or Cholesky factor of ε² Σ, shape
            `[d, d]`; at spread 0 the reference's own, σ or that of Σ.
        spread: ε >= 0, shape `[]`.
    """

    loc: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, spread: Tensor) -> None:
        super().__init__()
        if loc.ndim != 2 or scale.shape not in ((), (loc.shape[-1], loc.shape[-1])):
            raise ValueError(
                f"loc must have shape [P, d] and scale [] or [d, d], got {tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.register_buffer("spread", spread)
        self._derive()

    def _derive(self) -> None:
        self.is_point = float(self.spread) == 0
        self.is_gaussian = not self.is_point

    @classmethod
    def fit(
        cls,
        reference: Tensor,
        *,
        token_embeddings: Tensor,
        num_virtual_tokens: int,
        spread: float = 0.1,
        covariance: Literal["isotropic", "full"] = "isotropic",
    ) -> Self:
        """Centre the prior on a description.

        Args:
            reference: Shape `[n, d]`; gives the covariance.
            token_embeddings: The description's tokens in the layer's own space, shape `[T, d]`; trimmed or repeated
                in a cycle to `num_virtual_tokens`, as PEFT does.
            num_virtual_tokens: P.
            spread: ε >= 0, distance from the tokens in the reference's standard deviations. Tokens are about √2
                apart, so a prompt of spread 0.1 is still nearest to the description's own.
            covariance: `"isotropic"`, or the reference's `"full"` one (Ledoit-Wolf).
        """
        if not isinstance(token_embeddings, Tensor) or token_embeddings.ndim != 2 or len(token_embeddings) == 0:
            got = tuple(token_embeddings.shape) if isinstance(token_embeddings, Tensor) else token_embeddings
            raise ValueError(f"token_embeddings must be a tensor of shape [T, d] with T >= 1, got {got!r}")
        if not spread >= 0:
            raise ValueError(f"spread must be >= 0, got {spread!r}")
        if num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens must be >= 1, got {num_virtual_tokens!r}")
        if covariance == "isotropic":
            scale = GaussianPrior.fit(reference).scale[0].clone()
        elif covariance == "full":
            scale = torch.linalg.cholesky(fit_moments(reference)[1]).float()
        else:
            raise ValueError(f'covariance must be "isotropic" or "full", got {covariance!r}')
        if token_embeddings.shape[1] != reference.shape[1]:
            raise ValueError(
                f"token_embeddings must have the reference's width {reference.shape[1]}, got "
                f"{tuple(token_embeddings.shape)}"
            )
        tokens = token_embeddings.detach().float().cpu()
        loc = tokens[torch.arange(num_virtual_tokens) % len(tokens)]
        return cls(loc, scale * spread if spread > 0 else scale, torch.tensor(float(spread)))

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        """A, shape `[d, d]`; at spread 0 the reference's own, which whitened coordinates are measured in."""
        return self.scale if self.scale.ndim else self.scale * torch.eye(self.dim).to(self.scale)

    @property
    def distribution(self) -> torch.distributions.Distribution:
        if self.is_point:
            raise ValueError("a text prior of spread 0 has no density: set spread > 0, or prior_weight=0")
        if self.scale.ndim:
            return torch.distributions.MultivariateNormal(self.loc, scale_tril=self.scale, validate_args=False)
        normal = torch.distributions.Normal(self.loc, self.scale, validate_args=False)
        return torch.distributions.Independent(normal, 1, validate_args=False)

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        noise = self._noise(num_virtual_tokens, generator)
        return self.loc.clone() if self.is_point else self.to_prompt(noise)

    def to_prompt(self, z: Tensor) -> Tensor:
        return super().to_prompt(z) if self.scale.ndim else self.loc + z.to(self.loc.dtype) * self.scale

    def to_whitened(self, prompt: Tensor) -> Tensor:
        return super().to_whitened(prompt) if self.scale.ndim else (self._checked(prompt) - self.loc) / self.scale
