"""What the posterior predicts: token probabilities averaged over prompts drawn from it, and how sure they are."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from ..architecture import expand_cache
from ..calibration import Calibration, calibration
from ..data import IGNORED, pad, tokenize
from ..head import MOST_LOGITS, logits_of
from ..sharding import is_sharded


if TYPE_CHECKING:
    from ..model import PriorPeftModel

# What `generate` hands a model's forward a row of for each row.
OF_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")


@dataclass
class Prediction:
    """What the posterior predicts for reference answers, each token after the right ones before it.

    Args:
        nll: Negative log likelihood under averaged probabilities, in nats per answer token.
        num_tokens: Answer tokens.
        calibration: Of the likeliest tokens.
        entropy: Of the averaged probabilities, mean over each row's answer tokens, in nats, shape `[n]`.
        expected_entropy: Mean over draws of each one's entropy: what is uncertain whatever the prompt, in nats.
        mutual_information: The difference: what draws disagree on, in nats.
    """

    nll: float
    num_tokens: int
    calibration: Calibration
    entropy: list[float]
    expected_entropy: list[float]
    mutual_information: list[float]


@torch.no_grad()
def predict(
    model: "PriorPeftModel", tokenizer: Any, dataset: Any, count: int = 8, batch_size: int = 16, seed: int = 0
) -> Prediction:
    """Score a data set's answers by prompts drawn from the active adapter's posterior.

    Args:
        model: The tuned model.
        tokenizer: Its tokenizer.
        dataset: Rows with `prompt` and `completion`.
        count: Number of draws, all in one pass over each batch; 1 takes the prompt that stands for the posterior.
        batch_size: Rows a batch.
        seed: Of the draws.

    Raises:
        ValueError: There are no answer tokens.
    """
    tokenized = tokenize(dataset, tokenizer, None).with_format(None)
    rows = [{"attention_mask": [1] * len(row["input_ids"])} | row for row in tokenized]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    found: dict[str, list[Tensor]] = {name: [] for name in ("row", "nll", "sure", "right", "entropy", "expected")}
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with model.averaged(count, seed), tqdm(total=len(rows), desc="Predicting", leave=False, delay=2) as progress:
            for start in range(0, len(order), batch_size):
                chunk = order[start : start + batch_size]
                fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
                batch = {
                    name: pad([rows[row][name] for row in chunk], fill, "right").to(device)
                    for name, fill in fills.items()
                }
                states, supervision = model.predicting_states(**batch)
                for name, values in token_scores(model.base_model, states, supervision.targets).items():
                    found[name].append(values.cpu())
                found["row"].append(torch.tensor(chunk)[supervision.rows.cpu()])
                progress.update(len(chunk))
    finally:
        model.train(training)
    whole = {name: torch.cat(values) for name, values in found.items()}
    if not len(whole["row"]):
        raise ValueError("dataset must have answers to predict, got none")
    tokens = torch.bincount(whole["row"], minlength=len(rows)).clamp_min(1)
    entropy, expected = (
        torch.zeros(len(rows)).index_add(0, whole["row"], whole[name]) / tokens for name in ("entropy", "expected")
    )
    return Prediction(
        nll=whole["nll"].double().mean().item(),
        num_tokens=len(whole["row"]),
        calibration=calibration(whole["sure"], whole["right"]),
        entropy=entropy.tolist(),
        expected_entropy=expected.tolist(),
        mutual_information=(entropy - expected).clamp_min(0).tolist(),
    )


def mean_log_prob(log_probs: Tensor) -> Tensor:
    """Log of the mean probability over the first dimension: `[K, ...]` to `[...]`."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def mean_logits(logits: Tensor, count: int) -> Tensor:
    """Logits `[count · B, ...]` of each draw after another as log probabilities of their mean, `[B, ...]`."""
    if count == 1:
        return logits
    return mean_log_prob(logits.float().log_softmax(-1).unflatten(0, (count, -1)))


def token_scores(
    base: PreTrainedModel, states: Tensor, targets: Tensor, with_entropy: bool = True
) -> dict[str, Tensor]:
    """Figures of each supervised token, shape `[N]`, from the states `[K, N, d]` that predict it after each of K draws.

    Args:
        base: The base model, whose head is used.
        states: Final hidden states.
        targets: Token ids, shape `[N]`.
        with_entropy: Whether entropies are wanted too, which take as long as all else.

    Returns:
        Of averaged probabilities `nll` in nats, `sure`, the likeliest token's probability, and `right`, whether it is the
        target; `entropy`, and `expected`, the mean over draws of each one's, in nats.
    """
    most, parts = _tokens_at_once(base, states), defaultdict(list)
    for chunk, wanted in zip(states.split(most, dim=1), targets.split(most), strict=True):
        log_probs = logits_of(base, chunk).float().log_softmax(-1)
        mean = mean_log_prob(log_probs) if len(log_probs) > 1 else log_probs[0]
        sure, likeliest = mean.max(-1)
        found = {"nll": -mean.gather(1, wanted[:, None])[:, 0], "sure": sure.exp(), "right": likeliest == wanted}
        if with_entropy:
            found |= {"entropy": _entropy(mean), "expected": _entropy(log_probs).mean(0)}
        for name, values in found.items():
            parts[name].append(values)
    return {name: torch.cat(values) for name, values in parts.items()}


def divergence_from_mean(base: PreTrainedModel, states: Tensor, drawn: Tensor) -> Tensor:
    """KL(mean ‖ each) of probabilities after K prompts and their mean after D, in nats over all tokens, shape `[K]`.

    Args:
        base: The base model, whose head is used.
        states: Final hidden states, shape `[K, N, d]`; gradients go through them.
        drawn: Those after the prompts that are averaged, shape `[D, N, d]`.
    """
    total = states.new_zeros(len(states), dtype=torch.float32)
    size = _tokens_at_once(base, drawn)
    for chunk, averaged in zip(states.split(size, dim=1), drawn.split(size, dim=1), strict=True):
        with torch.no_grad():
            mean = mean_log_prob(logits_of(base, averaged).float().log_softmax(-1))
        log_probs = logits_of(base, chunk).float().log_softmax(-1)
        # Where a model rules a token out, both logarithms are infinite.
        total = total + torch.where(mean.isinf(), 0.0, mean.exp() * (mean - log_probs)).sum((1, 2))
    return total


def _tokens_at_once(base: PreTrainedModel, states: Tensor) -> int:
    if is_sharded(base):  # processes must use the head equally often
        return max(1, states.shape[1])
    return max(1, MOST_LOGITS // (len(states) * base.config.get_text_config().vocab_size))


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)


@contextmanager
def averaging_forward(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Have the base model's forward run each row `count` times over a cache of as many and average their probabilities.

    `generate` then sees the rows it was given, each with one distribution, and works as ever.
    """
    forward: Callable[..., Any] = model.forward

    @wraps(forward)
    def averaged_forward(*arguments: Any, **options: Any) -> Any:
        size = next(len(options[name]) for name in OF_ROWS if options.get(name) is not None)
        for name in OF_ROWS:
            if options.get(name) is not None:
                options[name] = options[name].expand(size, *options[name].shape[1:]).repeat_interleave(count, 0)
        outputs = forward(*arguments, **options)
        log_probs = outputs.logits.float().log_softmax(-1).unflatten(0, (size, count))
        outputs.logits = mean_log_prob(log_probs.transpose(0, 1))
        return outputs

    model.forward = averaged_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def joined_caches(caches: list[DynamicCache], batch_size: int) -> DynamicCache:
    """Caches at batch 1 side by side for each of `batch_size` rows: row 0 with every cache, row 1 with every cache, ..."""
    joined, count = expand_cache(caches[0], 1), len(caches)
    reorder = joined.reorder_cache

    def reorder_rows(rows: Tensor) -> None:
        reorder((rows[:, None] * count + torch.arange(count, device=rows.device)).flatten())

    joined.reorder_cache = reorder_rows  # type: ignore[method-assign]  # beams change places, each with all its draws
    for layer, parts in zip(joined.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True):
        if layer.is_initialized:
            for name in ("keys", "values"):
                stacked = torch.cat([getattr(part, name) for part in parts])
                setattr(layer, name, stacked.repeat(batch_size, 1, 1, 1))
    return joined
