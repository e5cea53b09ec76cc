"""The parameters of a prompt and their coordinates: `PriorPromptEncoder`."""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BasePromptEncoder
from torch import Tensor, nn

from .inference.posterior import MixturePosterior, Posterior
from .inference.variational import divergence
from .priors import Prior
from .sharding import whole


class PriorPromptEncoder(BasePromptEncoder):
    """Holds the one trainable parameter of a prompt and turns it into θ.

    Args:
        priors: One prior for each selected layer.
        coordinates: `"whitened"`: the parameter is z in θ = µ + A z; `"plain"`: it is θ.
        prompt: Initial prompt θ, shape `[S, P, d]`.
        posterior: How z spreads about the coordinate, where it is not a point.

    Attributes:
        coordinate: The parameter, z or θ, shape `[S, P, d]`, always float32: the mean of a posterior, or of the first
            Gaussian of a mixture.
        point: z of the prompt that stands for the posterior, shape `[S, P, d]`; None where that is the coordinate.
        initial_prompt: θ before training, shape `[S, P, d]`: drift is measured from it.
        is_particle: Whether it stands, with others, for the posterior of another prompt, and goes when training ends.
        free_scale: Whether the scale of the priors is found with the posterior, by the evidence.
        starts: θ where each Gaussian of a mixture began, shape `[C, S, P, d]`, while training knows it.
        noise: What draws for steps of training are made of; PyTorch's own if None.

    Output shape: `[S, P, d]`
    """

    priors: Any
    initial_prompt: Tensor
    point: Tensor | None
    posterior: Any
    starts: Tensor | None = None
    noise: torch.Generator | None = None

    def __init__(
        self, priors: Sequence[Prior], coordinates: str, prompt: Tensor, posterior: Posterior | None = None
    ) -> None:
        super().__init__()
        self.priors = nn.ModuleList(priors)
        self.coordinates = coordinates
        self.register_buffer("initial_prompt", prompt.detach().float().clone())
        self.coordinate = nn.Parameter(self.from_prompt(self.initial_prompt))
        self.posterior = posterior
        self.register_buffer("point", None)
        self.free_scale = self.is_particle = False

    def forward(self, drawn: bool = False, weighted: bool = True) -> Any:
        """θ of every selected layer, shape `[S, P, d]`; in float32 also under autocast, as it is saved.

        Args:
            drawn: For a step of training: with what its objective adds to the likelihood, in nats. These are θ and
                log p(θ), or, where a posterior is trained, a draw from it and −KL(q ‖ p); of each Gaussian of a mixture
                one draw, shape `[C, S, P, d]`.
            weighted: Whether that has any weight; None is returned for it else.
        """
        # Both in the module's own forward: where a user has sharded the prompt too, it is whole here only.
        if drawn:
            if torch.is_grad_enabled():
                self.point = None  # chosen of a posterior that now changes
            prompts = self.component_samples(self.noise) if self.is_variational else self._prompt()[None]
            return prompts, self._log_prior(prompts) if weighted else None
        return self._prompt()

    def _prompt(self) -> Tensor:
        if self.point is not None:
            return self._to_prompt(self.point)
        coordinate = whole(self.coordinate).float()
        if self.coordinates == "plain":
            # Not the parameter itself: sharded training frees that as soon as this module has run.
            return coordinate.clone()
        return self._to_prompt(coordinate)

    def component_samples(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw of θ from each Gaussian of a variational posterior, shape `[C, S, P, d]`."""
        parts = self.posterior.parts(self.coordinate)
        with self._full_precision():
            return torch.stack([self._to_prompt(part.sample(mean, 1, generator)[0]) for mean, part in parts])

    @torch.no_grad()
    def mean(self) -> Tensor:
        """θ at the mean of the posterior, in whitened coordinates, shape `[S, P, d]`; the prompt itself where it is a point."""
        if self.posterior is None:
            return self._prompt()
        is_mixture = isinstance(self.posterior, MixturePosterior)
        return self._to_prompt(self.posterior.mean(self.coordinate) if is_mixture else self.coordinate)

    @torch.no_grad()
    def rescale(self, factors: Tensor) -> None:
        """Give each layer's prior a spread `factors` `[S]` times as wide; prompt and posterior stay what they are.

        Raises:
            ValueError: A prior is not Gaussian.
        """
        factors = factors.to(self.coordinate)
        self.priors = nn.ModuleList(
            prior.scaled(factor) for prior, factor in zip(self.priors, factors.tolist(), strict=True)
        )
        self.coordinate.div_(factors[:, None, None])
        if self.point is not None:
            self.point.div_(factors[:, None, None])
        if self.posterior is not None:
            self.posterior.scale_by(1 / factors[:, None, None])

    @property
    def is_variational(self) -> bool:
        """Whether a posterior is trained beside the coordinate."""
        return self.posterior is not None and any(True for _ in self.posterior.parameters())

    def samples(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of θ from the posterior, shape `[count, S, P, d]`; the prompt itself where it is a point."""
        if self.posterior is None:
            return self._prompt().expand(count, -1, -1, -1)
        with self._full_precision():
            return torch.stack([self._to_prompt(z) for z in self.posterior.sample(self.coordinate, count, generator)])

    @torch.no_grad()
    def variance(self) -> Tensor:
        """Posterior variance of each whitened coordinate, in the prior's variances, shape `[S, P, d]`; 0 for a point."""
        if self.posterior is None:
            return torch.zeros_like(self.coordinate)
        return self.posterior.variance(self.coordinate)

    @property
    def has_density(self) -> bool:
        """Whether log p(θ) exists: not for a text prior of spread 0, which is a point."""
        return not any(getattr(prior, "is_point", False) for prior in self.priors)

    def log_prob(self, prompt: Tensor) -> Tensor:
        """log p(θ) of a prompt `[S, P, d]` summed over layers and virtual tokens, in nats."""
        with self._full_precision():
            return torch.stack([prior.log_prob(theta) for prior, theta in zip(self.priors, prompt, strict=True)]).sum()

    def _log_prior(self, prompts: Tensor) -> Tensor:
        if not self.is_variational:
            return self.log_prob(prompts[0])
        with self._full_precision():
            return -divergence(self, prompts)

    def drift(self, prompt: Tensor) -> Tensor:
        """Distance from the initial prompt in prior standard deviations, root mean square over coordinates."""
        pairs = zip(self.priors, prompt, self.initial_prompt, strict=True)
        steps = [prior.to_whitened(theta) - prior.to_whitened(start) for prior, theta, start in pairs]
        return torch.stack(steps).square().mean().sqrt()

    @torch.no_grad()
    def set_prompt(self, prompt: Tensor) -> None:
        """Move the parameter to where θ equals `prompt` `[S, P, d]`, in place, so that optimizers keep it."""
        self.point = None
        self.coordinate.copy_(self.from_prompt(prompt.to(self.coordinate)))

    def _to_prompt(self, coordinate: Tensor) -> Tensor:
        with self._full_precision():
            return torch.stack([prior.to_prompt(z) for prior, z in zip(self.priors, coordinate, strict=True)])

    def _full_precision(self) -> torch.autocast:
        # In bfloat16 the gradient of log p is off by a quarter where the covariance is narrow.
        return torch.autocast(self.coordinate.device.type, enabled=False)

    def from_prompt(self, prompt: Tensor) -> Tensor:
        """The coordinate at which θ is `prompt`, shape `[S, P, d]`."""
        if self.coordinates == "plain":
            return prompt.clone()
        return torch.stack([prior.to_whitened(theta) for prior, theta in zip(self.priors, prompt, strict=True)])
