"""Answers and their likelihood, for any causal language model with or without a prompt."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import EvalPrediction

from .calibration import BINS, Calibration, calibration_of, row_bins
from .choices import Metrics, metrics_by_likelihood
from .data import IGNORED, answer_start, pad, padded_text, prompts_of, tokenize


@dataclass
class Answers:
    """What a model answers to a data set's prompts.

    Args:
        nll: Negative log likelihood of the reference answers, in nats per answer token.
        predictions: Greedy answers, in the data set's order.
        references: The reference answers; for rows with `answers`, all of them.
        calibration: Of the likeliest token at each place of a reference answer.
    """

    nll: float
    predictions: list[str]
    references: list[Any]
    calibration: Calibration


def best_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    dataset: Any,
    max_new_tokens: int,
    batch_size: int = 16,
    desc: str = "Answering",
    max_length: int | None = None,
) -> Answers:
    """Score and generate the answers of a data set with a base model, a stock PEFT model or one of ours.

    Args:
        model: A causal language model; logits longer than the text (stock PEFT's) are aligned at their end.
        tokenizer: Its tokenizer.
        dataset: Rows with `prompt` and `completion`, and maybe `answers`, the texts any of which is right. A row's first
            token is not scored: without a prompt nothing predicts it.
        max_new_tokens: Most tokens of a generated answer.
        batch_size: Rows a batch.
        desc: What the progress bar says.
        max_length: Most tokens of a row, virtual tokens not counted; what the model's window leaves if None.
    """
    model.eval()
    device = next(model.parameters()).device
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    fills = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}
    window = context and context - virtual - max_new_tokens
    rows = list(tokenize(dataset, tokenizer, min(filter(None, (max_length, window)), default=None)))
    rows = [row | {"labels": [IGNORED, *list(row["labels"])[1:]]} for row in rows]
    prompts = prompts_of(*([row[name] for row in rows] for name in fills))
    # From the first token of the answer on.
    ends = [{name: list(row[name])[answer_start(row["labels"]) :] for name in fills} for row in rows]
    longest = max(map(len, prompts), default=0) + max((len(end["labels"]) for end in ends), default=0)
    # Padding between prompts and answers: answers start at one position, and the head computes nothing before it. Stock
    # PEFT's positions do not allow for padding before the answer, nor does MPT: they get prompts of one length together.
    pads = hasattr(model, "cached_prompt") and model.config.model_type != "mpt"
    batches = _by_length(prompts, batch_size, pads and (not context or virtual + longest <= context))
    total, bins = 0.0, torch.zeros(3, BINS, dtype=torch.float64)
    predictions = [""] * len(rows)
    cached_prompt = getattr(model, "cached_prompt", nullcontext)
    with cached_prompt(), tqdm(total=len(rows), desc=desc, leave=False) as progress:
        for batch in batches:
            before = padded_text([prompts[index] for index in batch], tokenizer.pad_token_id, "left", device)
            after = {
                name: pad([ends[index][name] for index in batch], fill, "right").to(device)
                for name, fill in fills.items()
            }
            labels = after.pop("labels")
            whole = {name: torch.cat([before[name], part], dim=1) for name, part in after.items()}
            logits = model(**whole, logits_to_keep=labels.shape[1] + 1).logits[:, -labels.shape[1] - 1 : -1]
            rows_of, places = (labels != IGNORED).nonzero(as_tuple=True)
            scores, targets = logits[rows_of, places].float().log_softmax(-1), labels[rows_of, places]
            total -= scores.gather(1, targets[:, None]).sum().item()
            sure, likeliest = scores.max(-1)
            bins += row_bins(rows_of, len(batch), sure.exp(), likeliest == targets).sum(0).cpu()
            generated = model.generate(
                **before, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            generated = generated[:, before["input_ids"].shape[1] :]
            for index, text in zip(batch, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
                predictions[index] = text
            progress.update(len(batch))
    references = _answers(dataset) or [
        tokenizer.decode([t for t in row["labels"] if t != IGNORED], skip_special_tokens=True) for row in rows
    ]
    found = calibration_of(bins)
    return Answers(total / max(sum(found.counts), 1), predictions, references, found)


def _by_length(prompts: list[list[int]], batch_size: int, mixed: bool) -> list[list[int]]:
    """Which prompts go together: about one length a batch, or exactly one."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    groups = [order] if mixed else [list(group) for _, group in groupby(order, key=lambda index: len(prompts[index]))]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


def _answers(dataset: Any) -> list[list[str]] | None:
    return [row["answers"] for row in dataset] if len(dataset) and "answers" in dataset[0] else None


def answer_metrics(
    tokenizer: Any,
    metrics: Metrics,
    dataset: Any = None,
    model: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """A task's metrics on texts as `PriorTrainer`'s `compute_metrics` on token ids.

    Args:
        tokenizer: The base model's.
        metrics: The task's.
        dataset: The rows that are evaluated, if they have `answers` (then a prediction is held against all of a row's) or
            `choices` (then the metrics by likelihood are there too, if there is a `model`).
        model: The model that is evaluated. Every process scores all choices, so that sharded models work.
        batch_size: Sequences a batch when choices are scored.
        max_length: Most tokens of a row with a choice, virtual tokens not counted; as in `PriorTrainingArguments`.

    Raises:
        ValueError: On evaluation, if it is of other rows than `dataset`'s.
    """
    answers = None if dataset is None else _answers(dataset)

    def decode(ids: Any) -> list[str]:
        ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predictions = decode(prediction.predictions)
        if dataset is not None and len(predictions) != len(dataset):
            raise ValueError(
                f"dataset must be what is evaluated, got {len(dataset)} rows and {len(predictions)} answers"
            )
        figures = metrics(predictions, answers or decode(prediction.label_ids))
        return figures | (
            metrics_by_likelihood(metrics, model, tokenizer, dataset, batch_size, max_length)
            if model is not None and dataset is not None
            else {}
        )

    return compute
