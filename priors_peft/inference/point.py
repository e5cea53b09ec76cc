"""One prompt for a posterior, where only one can be had: the stock adapter, exports, a single forward pass."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import model_inputs
from .predictive import divergence_from_mean


logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from ..trainer import PriorTrainer

# Rows as `predicting_states` takes them, and what their answers are predicted from after each draw, `[K, N, d]`.
Batch = tuple[tuple[Any, ...], Tensor]
# Training rows that decide, twice as many that are learnt from, and the answer tokens of either, at most.
ROWS, TOKENS = 32, 2048
# Of the steps towards the average: at most, one for so many of training, their first rate for one layer, and from how many
# nats per token on they are taken. With 1,024 rows it is 0.002, with 32 0.03.
STEPS, SHARE, RATE, WORTH = 40, 5, 0.05, 0.01


@torch.no_grad()
def choose_point(trainer: "PriorTrainer", name: str) -> None:
    """Let one prompt stand for a posterior: one that predicts as all draws do on average.

    It starts as that one of the mean and the draws with the least KL(average ‖ its own) over answer tokens of up to 32
    training rows. The mean alone will not do: in many dimensions that of a wide posterior is nowhere near its draws, and
    training has seen draws only. Nor will the draw that is likeliest under the training rows, which is the most
    overfitted one. Where the KL is 0.01 nats per token and more, as with few rows, Adam brings it further down, by a step for
    every five of training and at most 40, on up to 64 other rows if there are more than 64, and what comes out is kept if it
    is lower for those that decide (Balan et al., 2015, distil a posterior predictive into one network).

    Args:
        trainer: Its training has ended; `args.posterior_draws` is how many draws are taken, those that `averaged` takes.
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
        shuffled = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(0)).tolist()
        deciding = _batches(trainer, shuffled[:ROWS], count)
        candidates = [torch.cat([_states(trainer, asked), drawn]) for asked, drawn in deciding]
        found = _gaps(trainer, candidates, deciding)
        best = int(found.argmin())
        if best:
            draws = encoder.posterior.sample(encoder.coordinate, count, torch.Generator().manual_seed(0))
            encoder.point = draws[best - 1].detach().clone()
            if encoder.starts is not None:  # of a mixture: drift is from where the draw's own Gaussian began
                means = torch.stack([mean for mean, _ in encoder.posterior.parts(encoder.coordinate)])
                nearest = int((means - encoder.point).flatten(1).norm(dim=1).argmin())
                encoder.initial_prompt.copy_(encoder.starts[nearest])
        start, steps = encoder.point, min(STEPS, trainer.state.global_step // SHARE)
        tokens = sum(drawn.shape[1] for _, drawn in deciding)
        if steps and found[best] > WORTH * tokens:
            others = _batches(trainer, shuffled[ROWS : 3 * ROWS], count)
            _distil(trainer, name, others if len(shuffled) > 2 * ROWS else deciding + others, steps)
            after = _gaps(trainer, [_states(trainer, asked) for asked, _ in deciding], deciding)[0]
            told = float(found[best]) / tokens, float(after) / tokens
            logger.info("KL(average of the draws ‖ the one prompt): %.4f nats per token, distilled %.4f", *told)
            if not after < found[best]:
                encoder.point = start
    finally:
        model.active_adapter = active
        model.train(training)


def _batches(trainer: "PriorTrainer", rows: list[int], count: int) -> list[Batch]:
    """Training rows, `args.train_batch_size` at once."""
    size, tokens = trainer.args.train_batch_size, 0
    batches: list[Batch] = []
    for start in tqdm(range(0, len(rows), size), "Choosing the one prompt", leave=False, delay=2):
        some = [model_inputs(trainer.train_dataset[row]) for row in rows[start : start + size]]
        inputs = trainer._prepare_inputs(trainer.data_collator(some))
        asked = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
        with trainer.model.averaged(count):
            batches.append((asked, _states(trainer, asked)))
        tokens += batches[-1][1].shape[1]
        if tokens >= TOKENS:
            break
    return batches


def _states(trainer: "PriorTrainer", asked: tuple[Any, ...]) -> Tensor:
    with trainer.compute_loss_context_manager():
        return trainer.model.predicting_states(*asked)[0]


def _gaps(trainer: "PriorTrainer", states: list[Tensor], batches: list[Batch]) -> Tensor:
    """KL(average ‖ each) of K prompts after which answers are predicted from `states`, in nats over all, shape `[K]`."""
    pairs = zip(states, batches, strict=True)
    found = [divergence_from_mean(trainer.model.base_model, each, drawn) for each, (_, drawn) in pairs]
    return trainer.accelerator.reduce(torch.stack(found).sum(0), "mean")  # the same on all processes


def _distil(trainer: "PriorTrainer", name: str, batches: list[Batch], steps: int) -> None:
    """Bring KL(average ‖ the one prompt) down, in nats per token."""
    encoder, base = trainer.model.prompt_encoder[name], trainer.model.base_model
    point = (encoder.coordinate if encoder.point is None else encoder.point).detach().clone().requires_grad_()
    encoder.point, rate = point, RATE / len(encoder.priors) ** 0.5
    optimizer = torch.optim.Adam([point], lr=rate)
    for step in tqdm(range(steps), "Distilling the posterior", leave=False, delay=2):
        asked, drawn = batches[step % len(batches)]
        with torch.enable_grad():
            gap = divergence_from_mean(base, _states(trainer, asked), drawn)[0] / drawn.shape[1]
        (gradient,) = torch.autograd.grad(gap, point)
        point.grad = trainer.accelerator.reduce(gradient, "mean")
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
    encoder.point = point.detach()
