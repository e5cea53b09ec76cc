"""Stein variational gradient descent: particles that follow the likelihood together and keep apart."""

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Inference
from .posterior import SampledPosterior


if TYPE_CHECKING:
    from ..trainer import PriorTrainer


class Svgd(Inference):
    """Liu & Wang (2016), with a Gaussian kernel on z whose bandwidth is their median heuristic.

    The particles are prompts of one model, trained at once; they start at draws of the prior, or
    where training before left them. In many dimensions the
    kernel hardly keeps them apart (Zhuo et al., 2018): expect an ensemble rather than the posterior's spread.

    Args:
        num_particles: K >= 2.

    Raises:
        ValueError: A setting is out of range.
    """

    samples, alone, late = True, True, True

    def __init__(self, num_particles: int = 4) -> None:
        if not isinstance(num_particles, int) or num_particles < 2:
            raise ValueError(f"num_particles must be an integer >= 2, got {num_particles!r}")
        self.num_particles = num_particles

    def prompts(self, model: Any, name: str) -> list[str]:
        names = [name, *(f"{name}_particle{number}" for number in range(1, self.num_particles))]
        first, config = model.prompt_encoder[name], model.peft_config[name]
        draws: Any = first.posterior.draws if isinstance(first.posterior, SampledPosterior) else []
        first.posterior = None
        for number, particle in enumerate(names):
            encoder = first
            if particle not in model.peft_config:  # where training was stopped they are there
                encoder = copy.deepcopy(first).cpu()  # draws are the same on all devices
                encoder.is_particle = True
                generator = torch.Generator().manual_seed(config.seed + number)
                start = [prior.sample(config.num_virtual_tokens, generator) for prior in encoder.priors]
                encoder.set_prompt(torch.stack(start))
                model.prompt_encoder[particle] = encoder.to(first.coordinate.device)
                model.peft_config[particle] = copy.copy(config)
                model.provenance[particle] = model.provenance.get(name, [])
            if number < len(draws):
                model.prompt_encoder[particle].coordinate.data.copy_(draws[number])
        return names

    def before_step(self, trainer: "PriorTrainer") -> None:
        parameters = [trainer.model.prompt_encoder[name].coordinate for name in trainer.adapter_names]
        particles, gradients = (torch.stack(of) for of in (parameters, [part.grad for part in parameters]))
        # Losses are energies in nats per supervised token.
        weight = trainer.model.active_peft_config.prior_weight / trainer.num_supervised_tokens
        for parameter, direction in zip(parameters, stein_gradients(particles, gradients, weight), strict=True):
            parameter.grad.copy_(direction)

    def finish(self, trainer: "PriorTrainer") -> None:
        model, (name, *others) = trainer.model, trainer.adapter_names
        encoders = [model.prompt_encoder[particle] for particle in trainer.adapter_names]
        draws = torch.stack([encoder.coordinate.detach() for encoder in encoders])
        encoders[0].posterior = SampledPosterior(draws)
        with torch.no_grad():
            encoders[0].coordinate.copy_(draws.mean(0))
        for particle in others:
            model.delete_adapter(particle)
        trainer.adapter_names = [name]


def stein_gradients(particles: Tensor, gradients: Tensor, weight: float = 1.0) -> Tensor:
    """What each particle goes down along: equation 8 of Liu & Wang (2016), negated and times `weight`.

    Args:
        particles: z of each, shape `[K, ...]`.
        gradients: Gradient of `weight` times the energy −log p(z | data) at each, shape `[K, ...]`.
        weight: What the energy was multiplied by.
    """
    flat = particles.flatten(1)
    squared = torch.cdist(flat, flat).square()
    count = len(flat)
    apart = squared[~torch.eye(count, dtype=torch.bool, device=flat.device)]
    bandwidth = (apart.median() / math.log(count + 1)).clamp_min(torch.finfo(flat.dtype).tiny)
    kernel = (-squared / bandwidth).exp()
    repulsion = (kernel.sum(1, keepdim=True) * flat - kernel @ flat) * 2 / bandwidth
    return ((kernel @ gradients.flatten(1) - weight * repulsion) / count).view_as(gradients)
