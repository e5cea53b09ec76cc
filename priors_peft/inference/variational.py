"""Mean-field variational inference: the Gaussian q(z) of least KL(q ‖ p(z | data)), trained beside its mean."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .base import Inference
from .posterior import GaussianPosterior


if TYPE_CHECKING:
    from ..prompt import PriorPromptEncoder
    from ..trainer import PriorTrainer


class Variational(Inference):
    r"""Minimizes E_q[mean NLL] + (prior_weight / N) · KL(q ‖ p), the bound of Blei et al. (2017), with one draw of q a step.

    The KL is exact against Gaussian priors, by the same draw against others. `prior_weight` < 1 is the cold posterior of
    Wenzel et al. (2020); `prior_weight_schedule="linear"` its warm-up.

    Args:
        initial_scale: Standard deviation of q at the start, in prior standard deviations, > 0.
        rank: Directions in which coordinates vary together, beside their own variances (Ong et al., 2018); 0 for none.

    Raises:
        ValueError: A setting is out of range.
    """

    samples = True
    prior_weight = 0.03

    def __init__(self, initial_scale: float = 0.1, rank: int = 0) -> None:
        if not initial_scale > 0:
            raise ValueError(f"initial_scale must be > 0, got {initial_scale}")
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank must be an integer >= 0, got {rank!r}")
        self.initial_scale, self.rank = initial_scale, rank

    def start(self, encoder: "PriorPromptEncoder") -> GaussianPosterior:
        shape = encoder.coordinate.shape
        # Not zero, where the gradient of F vanishes; the same on all processes.
        generator = torch.Generator().manual_seed(0)
        share = self.initial_scale / (1 + self.rank) ** 0.5
        factor = torch.randn((self.rank, *shape), generator=generator) * share
        scale = torch.full(shape, float(share))
        return GaussianPosterior.of_scale(scale, factor, trained=True).to(encoder.coordinate.device)

    def finish(self, trainer: "PriorTrainer") -> None:
        for name in trainer.adapter_names:
            encoder = trainer.model.prompt_encoder[name]
            if encoder.free_scale:
                second_moment = encoder.coordinate.square() + encoder.posterior.variance(encoder.coordinate)
                encoder.rescale(second_moment.detach().mean((1, 2)).sqrt())


def divergence(encoder: "PriorPromptEncoder", prompt: Tensor) -> Tensor:
    """KL(q ‖ p) in nats; against layers whose prior is not Gaussian estimated by one draw.

    Args:
        encoder: Of q and p.
        prompt: A draw θ from q, shape `[S, P, d]`.
    """
    posterior = encoder.posterior
    second_moment = encoder.coordinate.square() + posterior.variance(encoder.coordinate)
    expected = []
    for layer, prior in enumerate(encoder.priors):
        if prior.is_gaussian:
            size, total = second_moment[layer].numel(), second_moment[layer].sum()
            if encoder.free_scale:
                # At the scale c of least divergence, c² = mean E[z²].
                total = size * (1 + (total / size).log())
            expected.append(-(total + size * math.log(2 * math.pi)) / 2)
        else:
            volume = prior.scale_tril.diagonal().log().sum() * prompt.shape[1]
            expected.append(prior.log_prob(prompt[layer]) + volume)
    return -posterior.entropy() - torch.stack(expected).sum()
