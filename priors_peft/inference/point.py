"""One prompt for a posterior, where only one can be had: the stock adapter, exports, a single forward pass."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import model_inputs
from .predictive import divergence_from_mean


if TYPE_CHECKING:
    from ..trainer import PriorTrainer

# Training rows that decide, at most.
ROWS = 32


@torch.no_grad()
def choose_point(trainer: "PriorTrainer", name: str) -> None:
    """Let that one of a posterior's mean and draws stand for it that predicts most as all draws do on average.

    It has the least KL(average ‖ its own) over answer tokens of up to 32 training rows. The mean alone will not do: in many
    dimensions that of a wide posterior is nowhere near its draws, and training has seen draws only. Nor will the draw that
    is likeliest under the training rows, which is the most overfitted one.

    Args:
        trainer: Its training has ended; `args.posterior_draws` is how many draws are tried, those that `averaged` takes.
        name: The prompt; one without a posterior is left alone.
    """
    model, count = trainer.model, trainer.args.posterior_draws
    encoder = model.prompt_encoder[name]
    encoder.point = None
    if encoder.posterior is None or count < 2:
        return
    training, active = model.training, model.active_adapter
    model.active_adapter = name
    model.eval()
    try:
        found = trainer.accelerator.reduce(_divergences(trainer, count), "mean")  # the same on all processes
    finally:
        model.active_adapter = active
        model.train(training)
    best = int(found.argmin())
    if best:
        draws = encoder.posterior.sample(encoder.coordinate, count, torch.Generator().manual_seed(0))
        encoder.point = draws[best - 1].detach().clone()


def _divergences(trainer: "PriorTrainer", count: int) -> Tensor:
    """KL(average of the draws ‖ each), the mean's first, in nats over training rows' answer tokens, shape `[1 + count]`."""
    model, rows, size = trainer.model, trainer.train_dataset, trainer.args.eval_batch_size
    some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:ROWS].tolist()
    found = torch.zeros(1 + count, device=trainer.args.device)
    for start in tqdm(range(0, len(some), size), "Choosing the one prompt", leave=False, delay=2):
        batch = trainer.data_collator([model_inputs(rows[row]) for row in some[start : start + size]])
        inputs = trainer._prepare_inputs(batch)
        asked = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
        with trainer.compute_loss_context_manager():
            alone, _ = model.predicting_states(*asked)
            with model.averaged(count):
                drawn, _ = model.predicting_states(*asked)
            found += divergence_from_mean(model.base_model, torch.cat([alone, drawn]), count)
    return found
