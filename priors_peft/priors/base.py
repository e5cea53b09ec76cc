"""What a prior is: a probability distribution over the virtual tokens of one layer's prompt."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from .moments import Moments


class Prior(nn.Module, ABC):
    r"""A distribution p(θ) over a prompt θ of P virtual tokens in a d-dimensional space.

    Virtual tokens are independent unless a family says otherwise: log p(θ) = Σ_p log p(θ_p), in nats. A family is a
    module whose buffers are the arguments of its constructor under the same names; that alone makes it move between
    devices, save and load. To add one, write `fit`, `distribution` (or `log_prob` and `sample`), `loc` and
    `scale_tril`.

    Every prior has a location µ and a scale factor A (lower triangular, with AAᵀ the covariance of one virtual
    token, or proportional to it where a family says so). They define the whitened coordinates z of a prompt:
    θ = µ + A z. Families that are cheaper without a triangle (low rank, mixtures, interpolation) use another root of
    the same AAᵀ, which turns z and leaves its length as it is.
    """

    loc: Tensor
    """Location µ, shape `[d]`, or `[P, d]` where each virtual token has its own."""
    scale_tril: Tensor
    """Scale factor A, lower triangular, shape `[d, d]`."""
    is_gaussian: bool = False
    """Whether p(θ) is N(µ, AAᵀ), so that whitened coordinates are standard normal."""
    root: str = "scale"
    """Of a Gaussian prior, the buffer that A is proportional to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_derive_again)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        # One memory layout, whatever the fit left: a prior that was stored computes bit for bit what it did before.
        super().register_buffer(name, tensor if tensor is None else tensor.detach().contiguous(), persistent)

    @property
    def distribution(self) -> torch.distributions.Distribution:
        """The distribution of one virtual token, event shape `[d]`, where `torch.distributions` has it."""
        raise NotImplementedError(
            f"{type(self).__name__} has no torch distribution: write its `distribution`, or its `log_prob` and `sample`"
        )

    # `*args` takes nothing: it lets a family name its own keywords without breaking the signature for type checkers.
    @classmethod
    @abstractmethod
    def fit(cls, reference: Any, *args: Any, **kwargs: Any) -> "Prior":
        """Fit the prior to a reference.

        Args:
            reference: Vectors of the layer's own space, shape `[n, d]`, or their streamed `Moments`.
            **kwargs: The family's own settings (`PriorConfig.prior_kwargs`).

        Raises:
            ValueError: The reference is not a finite `[n, d]` tensor with n >= 2, or a setting is not valid.
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
        return self.to_prompt(self._noise(num_virtual_tokens, generator))

    def to_prompt(self, z: Tensor) -> Tensor:
        """θ = µ + A z, shape `[..., P, d]`."""
        return self.loc + z.to(self.loc.dtype) @ self.scale_tril.mT

    def to_whitened(self, prompt: Tensor) -> Tensor:
        """z = A⁻¹(θ − µ), shape `[..., P, d]`: the drift from the location in prior standard deviations."""
        return solve_rows(self.scale_tril, self._checked(prompt) - self.loc)

    def scaled(self, factor: float) -> Self:
        """The same prior with `factor` times as wide a spread about its location.

        Raises:
            ValueError: It is not Gaussian.
        """
        if not self.is_gaussian:
            raise ValueError(f"prior must be Gaussian for its scale to be changed, got {type(self).__name__}")
        state = self.state_dict()
        return type(self)(**state | {self.root: state[self.root] * factor})

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild a prior from `state_dict()`.

        A family of several structures is a class and its subclasses; the one that takes these tensors is built.
        """
        for candidate in _with_subclasses(cls):
            if inspect.signature(candidate).parameters.keys() == state.keys():
                return candidate(**state)
        expected = ", ".join(inspect.signature(cls).parameters)
        raise ValueError(f"state must hold the tensors of a {cls.__name__} ({expected}), got {', '.join(state)}")

    def _derive(self) -> None:
        """Compute once what follows from the buffers; called by the constructor and after `load_state_dict`."""

    def _noise(self, num_virtual_tokens: int, generator: torch.Generator | None) -> Tensor:
        if self.loc.ndim == 2 and num_virtual_tokens != len(self.loc):
            raise ValueError(
                f"num_virtual_tokens must be the prior's {len(self.loc)}, got {num_virtual_tokens}: each virtual "
                "token has its own location. Fit the prior for this number"
            )
        device = generator.device if generator is not None else self.loc.device
        shape = (num_virtual_tokens, self.dim)
        # float32 whatever the default: the same seed gives the same prompt inside a bf16 context too.
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(self.loc)

    def _checked(self, prompt: Tensor) -> Tensor:
        if prompt.ndim < 2 or prompt.shape[-1] != self.dim:
            raise ValueError(
                f"prompt must have the prior's width {self.dim} as its last dimension, got shape "
                f"{tuple(prompt.shape)}. Fit a prior for this model, or load the base model the prior was fitted on"
            )
        if self.loc.ndim == 2 and prompt.shape[-2] != len(self.loc):
            raise ValueError(
                f"prompt must have the prior's {len(self.loc)} virtual tokens, got shape {tuple(prompt.shape)}. "
                "Fit the prior for this number of virtual tokens"
            )
        # A density of thousands of dimensions needs the buffers' precision, whatever the prompt is kept in.
        return prompt.to(self.loc.dtype)


def _with_subclasses(kind: type[Any]) -> list[type[Any]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _with_subclasses(child))]


def _derive_again(prior: nn.Module, _: Any) -> None:
    prior._derive()  # type: ignore[operator]


def solve_rows(triangle: Tensor, rows: Tensor) -> Tensor:
    """A⁻¹x for each row x of `rows` `[..., d]`, with A lower triangular."""
    # As one matrix: with leading dimensions the solver would copy A for each.
    columns = rows.reshape(-1, rows.shape[-1]).mT
    return torch.linalg.solve_triangular(triangle, columns, upper=False).mT.reshape(rows.shape)


def check_reference(reference: Tensor | Moments) -> Tensor:
    """`reference` in float64, or `ValueError` if it is not a finite `[n, d]` tensor with n >= 2.

    Of streamed moments it is the sample of rows.
    """
    if isinstance(reference, Moments):
        reference = reference.sample
    if not isinstance(reference, Tensor) or reference.ndim != 2 or reference.shape[0] < 2:
        got = tuple(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
        raise ValueError(f"reference must be a tensor of shape [n, d] with n >= 2 rows, got {got}")
    reference = reference.detach().to("cpu", torch.float64)
    if not torch.isfinite(reference).all():
        bad = int((~torch.isfinite(reference)).any(-1).sum())
        raise ValueError(f"reference must be finite, got {bad} of {len(reference)} rows with inf or nan: drop them")
    return reference
