"""One prompt for a posterior, where only one can be had: the stock adapter, exports, a single forward pass."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import model_inputs


if TYPE_CHECKING:
    from ..trainer import PriorTrainer

# Training rows that decide, at most.
ROWS = 32


@torch.no_grad()
def choose_point(trainer: "PriorTrainer", name: str) -> None:
    """Let the likeliest of a posterior's mean and draws stand for it, by up to 32 training rows.

    In many dimensions the mean of a wide posterior is nowhere near its draws: it is the shorter by √(1 + s²/m²), with s²
    its variance and m² the mean's square. Training has seen draws only, and a model may do badly at what it has not seen.

    Args:
        trainer: Its training has ended; `args.posterior_draws` is how many draws are tried, those that `averaged` takes.
        name: The prompt; one without a posterior is left alone.
    """
    model, count = trainer.model, trainer.args.posterior_draws
    encoder = model.prompt_encoder[name]
    encoder.point = None
    if encoder.posterior is None or count < 2:
        return
    draws = encoder.posterior.sample(encoder.coordinate, count, torch.Generator().manual_seed(0))
    found = [_nll(trainer, name, point) for point in tqdm((None, *draws), "One of the draws", leave=False, delay=2)]
    best = min(range(len(found)), key=found.__getitem__)
    encoder.point = None if best == 0 else draws[best - 1].clone()


def _nll(trainer: "PriorTrainer", name: str, point: Tensor | None) -> float:
    """Training rows' mean over answer tokens at z, or at the posterior's mean, in nats; the same on all processes."""
    model, rows, size = trainer.model, trainer.train_dataset, trainer.args.eval_batch_size
    training, active = model.training, model.active_adapter
    model.prompt_encoder[name].point, model.active_adapter = point, name
    model.eval()
    nll = tokens = torch.zeros((), device=trainer.args.device)
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ROWS].tolist()
    try:
        for start in range(0, len(some), size):
            batch = trainer.data_collator([model_inputs(rows[row]) for row in some[start : start + size]])
            with trainer.compute_loss_context_manager():
                outputs = model(**trainer._prepare_inputs(batch), return_logits=False)
            nll, tokens = nll + outputs.row_nll.sum(), tokens + outputs.row_tokens.sum()
    finally:
        model.active_adapter = active
        model.train(training)
    return trainer.accelerator.reduce(nll / tokens, "mean").item()
