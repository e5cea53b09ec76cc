"""Variational inference: the Gaussian q(z), or mixture of some, of least KL(q ‖ p(z | data))."""

import copy
import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Inference
from .posterior import GaussianPosterior, MixturePosterior


if TYPE_CHECKING:
    from ..prompt import PriorPromptEncoder
    from ..trainer import PriorTrainer

logger = logging.getLogger(__name__)

# How often a Gaussian sees each row, from which on another one is worth more, and how many there are at most.
VISITS, MOST = 8, 8


class Variational(Inference):
    r"""Minimizes E_q[mean NLL] + (prior_weight / N) · KL(q ‖ p), the bound of Blei et al. (2017), with one draw of q a step.

    The KL is exact against Gaussian priors, by the same draw against others. `prior_weight` < 1 is the cold posterior of
    Wenzel et al. (2020); `prior_weight_schedule="linear"` its warm-up.

    Where data are few and training sees each row many times, q is a mixture of Gaussians of equal weight (Jaakkola & Jordan,
    1998; of independent starts Wilson & Izmailov, 2020), which share each step's rows out among them: it takes no more steps.

    Args:
        components: How many Gaussians; `"auto"`: as many as see each row some eight times in training, at most 8 and the rows
            of a step; one where predictions are not averaged (`posterior_draws=1`) or the optimizer is the user's own.
        initial_scale: Standard deviation of q at the start, in prior standard deviations, > 0.
        rank: Directions in which coordinates vary together, beside their own variances (Ong et al., 2018); 0 for none.

    Raises:
        ValueError: A setting is out of range.
    """

    samples = True
    prior_weight = 0.01

    def __init__(self, initial_scale: float = 0.1, rank: int = 0, components: int | str = "auto") -> None:
        if not initial_scale > 0:
            raise ValueError(f"initial_scale must be > 0, got {initial_scale}")
        if not isinstance(rank, int) or rank < 0:
            raise ValueError(f"rank must be an integer >= 0, got {rank!r}")
        if components != "auto" and (not isinstance(components, int) or components < 1):
            raise ValueError(f'components must be an integer >= 1 or "auto", got {components!r}')
        self.initial_scale, self.rank, self.components = initial_scale, rank, components

    def start(self, encoder: "PriorPromptEncoder") -> GaussianPosterior:
        shape = encoder.coordinate.shape
        # Not zero, where the gradient of F vanishes; the same on all processes.
        generator = torch.Generator().manual_seed(0)
        share = self.initial_scale / (1 + self.rank) ** 0.5
        factor = torch.randn((self.rank, *shape), generator=generator) * share
        scale = torch.full(shape, float(share))
        return GaussianPosterior.of_scale(scale, factor, trained=True).to(encoder.coordinate.device)

    def begin(self, trainer: "PriorTrainer", name: str) -> None:
        encoder, config = trainer.model.prompt_encoder[name], trainer.model.peft_config[name]
        posterior, count = encoder.posterior, self._count(trainer)
        if isinstance(posterior, MixturePosterior) or posterior.log_scale.unique().numel() > 1:
            there = len(posterior.parts(encoder.coordinate))
            if self.components not in ("auto", there):
                logger.warning(
                    "components=%d is not for %r, whose trained posterior goes on with %d", count, name, there
                )
            return
        if count == 1:
            return
        start = encoder().detach()
        starts = [start] * count
        # A prompt that was trained before has no other beginnings.
        if torch.allclose(encoder.coordinate, encoder.from_prompt(encoder.initial_prompt), atol=1e-2):
            starts[1:] = _other_starts(trainer.model.base_model, config, encoder, count)
        means = torch.stack([encoder.from_prompt(one) for one in starts[1:]])
        others = [copy.deepcopy(posterior) for _ in means]
        encoder.posterior = MixturePosterior([posterior, *others], means, trained=True)
        encoder.starts = torch.stack(starts)
        encoder.posterior.requires_grad_(encoder.coordinate.requires_grad)

    def _count(self, trainer: "PriorTrainer") -> int:
        args, own = trainer.args, trainer.optimizer is not None
        if isinstance(self.components, int):
            if own and self.components > 1:
                raise ValueError(
                    f"components must be 1 with an optimizer of your own, got {self.components}: it was made before these "
                    "parameters. Leave out optimizers=, or name one by optim="
                )
            return self.components
        if own or args.posterior_draws == 1 or not hasattr(trainer.train_dataset, "__len__"):
            return 1
        rows_a_step = trainer.get_total_train_batch_size(args)
        batches = math.ceil(len(trainer.train_dataset) * args.gradient_accumulation_steps / rows_a_step)
        epochs = args.max_steps / math.ceil(batches / args.gradient_accumulation_steps)
        visits = epochs if args.max_steps > 0 else args.num_train_epochs
        return max(1, min(MOST, rows_a_step, round(visits / VISITS)))

    def finish(self, trainer: "PriorTrainer") -> None:
        for name in trainer.adapter_names:
            encoder = trainer.model.prompt_encoder[name]
            if encoder.free_scale:
                parts = encoder.posterior.parts(encoder.coordinate)
                second_moment = torch.stack([mean.square() + part.variance(mean) for mean, part in parts])
                encoder.rescale(second_moment.detach().mean((0, 2, 3)).sqrt())


def _other_starts(model: Any, config: Any, encoder: "PriorPromptEncoder", count: int) -> list[Tensor]:
    from ..fitting import new_prompt

    priors = copy.deepcopy(encoder.priors).cpu()  # draws are the same on all devices
    seeds = [config.seed + 1_000_003 * number for number in range(1, count)]
    return [new_prompt(model, config, priors, seed).to(encoder.initial_prompt) for seed in seeds]


def divergence(encoder: "PriorPromptEncoder", prompts: Tensor) -> Tensor:
    """KL(q ‖ p) in nats; against layers whose prior is not Gaussian estimated by one draw.

    Of a mixture of C Gaussians it is their mean, KL(q_c ‖ p), which is above KL(q ‖ p), as that is convex in q, by log C at
    most: by that where they do not overlap, and in the dimensions of prompts they do not.

    Args:
        encoder: Of q and p.
        prompts: A draw θ from each Gaussian of q, shape `[C, S, P, d]`.
    """
    parts = encoder.posterior.parts(encoder.coordinate)
    second_moment = torch.stack([mean.square() + part.variance(mean) for mean, part in parts]).mean(0)
    expected = []
    for layer, prior in enumerate(encoder.priors):
        if prior.is_gaussian:
            size, total = second_moment[layer].numel(), second_moment[layer].sum()
            if encoder.free_scale:
                # At the scale c of least divergence, c² = mean E[z²].
                total = size * (1 + (total / size).log())
            expected.append(-(total + size * math.log(2 * math.pi)) / 2)
        else:
            volume = prior.scale_tril.diagonal().log().sum() * prompts.shape[2]
            expected.append(torch.stack([prior.log_prob(prompt[layer]) for prompt in prompts]).mean() + volume)
    entropy = torch.stack([part.entropy() for _, part in parts]).mean()
    return -entropy - torch.stack(expected).sum()
