"""The Laplace approximation: a Gaussian about the mode, with the likelihood's curvature where there is any."""

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import model_inputs
from ..head import logits_of, supervised_nll
from ..sharding import is_sharded
from .base import Inference
from .posterior import DirectionalPosterior


if TYPE_CHECKING:
    from ..trainer import PriorTrainer


class Laplace(Inference):
    r"""N(m, (H / T + I)⁻¹) in whitened coordinates about the MAP estimate m (MacKay, 1992).

    H is the generalized Gauss–Newton matrix of the training rows' likelihood, which for a language model is its Fisher
    information (Martens, 2020): the second moment of gradients under answers that the model itself draws. It is known in
    the directions of `num_draws` such gradients; elsewhere the prior is left as it is.

    Args:
        num_draws: Gradients over all rows, each under answers drawn anew, >= 1.

    Raises:
        ValueError: A setting is out of range.
    """

    samples, alone, late = True, True, True

    def __init__(self, num_draws: int = 64) -> None:
        if not isinstance(num_draws, int) or num_draws < 1:
            raise ValueError(f"num_draws must be an integer >= 1, got {num_draws!r}")
        self.num_draws = num_draws

    def finish(self, trainer: "PriorTrainer") -> None:
        name = trainer.adapter_names[0]
        config, encoder = trainer.model.peft_config[name], trainer.model.prompt_encoder[name]
        gradients = fisher_gradients(trainer, self.num_draws)
        values, directions = curvature(gradients)
        values, squared_norm = values / config.prior_weight, encoder.coordinate.square().sum().item()
        precision = best_precision(squared_norm, values) if encoder.free_scale else 1.0
        encoder.posterior = laplace_posterior(values, directions, precision)
        if encoder.free_scale:
            encoder.rescale(torch.full((len(encoder.priors),), precision**-0.5))


def curvature(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[r]` and eigenvectors `[r, ...]`, where not zero, of the mean of ggᵀ over gradients g `[M, ...]`."""
    flat = gradients.flatten(1).double() / math.sqrt(len(gradients))
    _, roots, directions = torch.linalg.svd(flat, full_matrices=False)
    known = roots > roots[0] * max(flat.shape) * torch.finfo(flat.dtype).eps
    return roots[known].square(), directions[known].view(-1, *gradients.shape[1:])


def laplace_posterior(values: Tensor, directions: Tensor, precision: float = 1.0) -> DirectionalPosterior:
    """The Gaussian with precision λ_j + τ in the j-th direction, τ in all others.

    Args:
        values: λ, shape `[r]`.
        directions: Orthonormal, shape `[r, S, P, d]`.
        precision: τ of the prior.
    """
    scale = (values + precision).rsqrt()
    return DirectionalPosterior(directions.float(), scale.float(), scale.new_tensor(precision**-0.5).float())


def log_evidence(
    log_likelihood: float, squared_norm: float, values: Tensor, size: int, precision: float = 1.0
) -> float:
    """log p(data) by the Laplace approximation, in nats: equation 2.8 of MacKay (1992).

    Args:
        log_likelihood: log p(data | m) at the mode, in nats.
        squared_norm: |m|² in whitened coordinates.
        values: Curvature λ in its directions, shape `[r]`.
        size: Number of coordinates.
        precision: τ of the prior N(0, I / τ).
    """
    log_determinant = torch.log1p(values.double() / precision).sum().item()
    log_prior = (size * math.log(precision) - precision * squared_norm) / 2
    return log_likelihood + log_prior - (log_determinant + size * math.log(precision)) / 2


def best_precision(squared_norm: float, values: Tensor, precision: float = 1.0) -> float:
    """The τ of most evidence, by MacKay's fixed point τ = γ / |m|² with γ the number of well-determined directions."""
    for _ in range(200):
        before, precision = precision, (values / (values + precision)).sum().item() / squared_norm
        if abs(precision - before) <= 1e-9 * precision:
            break
    return precision


def fisher_gradients(trainer: "PriorTrainer", count: int) -> Tensor:
    """Gradients whose second moment is the training rows' Fisher information in whitened coordinates.

    Signs at random make the terms of different tokens cancel in it on average, so one gradient covers all rows.

    Returns:
        Shape `[count, S, P, d]`, in nats per standard deviation of the prior.
    """
    model, base = trainer.model, trainer.model.base_model
    name = trainer.adapter_names[0]
    coordinate = model.prompt_encoder[name].coordinate
    total = coordinate.new_zeros(count, *coordinate.shape)
    training = model.training
    model.eval()
    args, rows = trainer.args, trainer.train_dataset
    # Each row once, on one of the processes, which a loader that shares rows out evenly would not do.
    own = range(args.process_index, len(rows), args.world_size)
    starts = range(0, -(-len(rows) // args.world_size), args.train_batch_size)
    sharded = is_sharded(model)
    try:
        for start in tqdm(starts, "Curvature", leave=False, delay=2):
            # A process without a row left goes through one again, for nothing: a sharded model needs all of them.
            batch, weight = own[start : start + args.train_batch_size] or own[:1], float(start < len(own))
            inputs: dict[str, Any] = trainer._prepare_inputs(
                trainer.data_collator([model_inputs(rows[row]) for row in batch])
            )
            predicting_states = partial(
                model.predicting_states, inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
            )
            states, asked = predicting_states()
            with torch.no_grad():
                probabilities = logits_of(base, states.detach())[0].float().softmax(-1).cpu()
            lengths = torch.bincount(asked.rows, minlength=len(batch)).tolist()
            of_row = zip(batch, probabilities.split(lengths), strict=True)
            drawn = [_drawn_answers(one, count, args.seed * 1_000_003 + row) for row, one in of_row]
            answers, signs = (torch.cat(parts, 1).to(states.device) for parts in zip(*drawn, strict=True))
            for draw in range(count):
                if draw and sharded:  # the hooks of its graph are good for one backward pass
                    states, _ = predicting_states()
                nll = supervised_nll(base, states[0], answers[draw])
                keep = draw < count - 1 and not sharded
                total[draw] += torch.autograd.grad(nll, coordinate, weight * signs[draw], retain_graph=keep)[0]
    finally:
        model.train(training)
    return trainer.accelerator.reduce(total, "sum")


def _drawn_answers(probabilities: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and signs, both `[count, N]`, for a row's probabilities `[N, V]`, whatever batch it is in."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(probabilities, count, replacement=True, generator=generator).mT
    return tokens, torch.randint(2, tokens.shape, generator=generator) * 2.0 - 1
