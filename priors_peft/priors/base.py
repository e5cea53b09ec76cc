"""What a prior is: a probability distribution over the virtual tokens of one layer's prompt."""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn


class Prior(nn.Module, ABC):
    r"""A distribution p(θ) over a prompt θ of P virtual tokens in a d-dimensional space.

    Virtual tokens are independent unless a family says otherwise: log p(θ) = Σ_p log p(θ_p), in nats. A family is a
    module whose buffers are the arguments of its constructor under the same names; that alone makes it move between
    devices, save and load. To add one, write `fit`, `distribution` (or `log_prob`), `loc` and `scale_tril`.

    Every prior has a location µ and a scale factor A (lower triangular, with AAᵀ the covariance of one virtual
    token). They define the whitened coordinates z of a prompt: θ = µ + A z.
    """

    loc: Tensor
    """Location µ, shape `[d]`, or `[P, d]` where each virtual token has its own."""
    scale_tril: Tensor
    """Scale factor A, lower triangular, shape `[d, d]`."""

    @property
    @abstractmethod
    def distribution(self) -> torch.distributions.Distribution:
        """The distribution of one virtual token, event shape `[d]`."""

    @classmethod
    @abstractmethod
    def fit(cls, reference: Tensor, **kwargs: Any) -> Self:
        """Fit the prior to a reference.

        Args:
            reference: Vectors of the layer's own space, shape `[n, d]`.
            **kwargs: The family's own settings (`PriorConfig.prior_kwargs`).

        Raises:
            ValueError: The reference is not a finite `[n, d]` tensor with n >= 2.
        """

    @property
    def dim(self) -> int:
        """Width d of the space the prior lives in."""
        return self.loc.shape[-1]

    def log_prob(self, prompt: Tensor) -> Tensor:
        """Log density of prompts, in nats: shape `[..., P, d]` to `[...]`."""
        return self.distribution.log_prob(self._checked(prompt)).sum(-1)

    def sample(self, num_virtual_tokens: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw one prompt, shape `[num_virtual_tokens, d]`. The draw is made on the generator's device."""
        device = generator.device if generator is not None else self.loc.device
        noise = torch.randn(num_virtual_tokens, self.dim, generator=generator, device=device)
        return self.to_prompt(noise.to(self.loc))

    def to_prompt(self, z: Tensor) -> Tensor:
        """θ = µ + A z, shape `[..., P, d]`."""
        return self.loc + z @ self.scale_tril.mT

    def to_whitened(self, prompt: Tensor) -> Tensor:
        """z = A⁻¹(θ − µ), shape `[..., P, d]`: the drift from the location in prior standard deviations."""
        centred = (self._checked(prompt) - self.loc).mT
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).mT

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild a prior from `state_dict()`."""
        return cls(**state)

    def _checked(self, prompt: Tensor) -> Tensor:
        if prompt.shape[-1] != self.dim:
            raise ValueError(
                f"prompt must have the prior's width {self.dim} as its last dimension, got shape "
                f"{tuple(prompt.shape)}. Fit a prior for this model, or load the base model the prior was fitted on"
            )
        return prompt


def check_reference(reference: Tensor) -> Tensor:
    """`reference` in float64, or `ValueError` if it is not a finite `[n, d]` tensor with n >= 2."""
    if reference.ndim != 2 or reference.shape[0] < 2:
        raise ValueError(f"reference must have shape [n, d] with n >= 2 rows, got {tuple(reference.shape)}")
    reference = reference.detach().to("cpu", torch.float64)
    if not torch.isfinite(reference).all():
        bad = int((~torch.isfinite(reference)).any(-1).sum())
        raise ValueError(f"reference must be finite, got {bad} of {len(reference)} rows with inf or nan: drop them")
    return reference
