"""Answers and their likelihood, for any causal language model with or without a prompt."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorForSeq2Seq, EvalPrediction

from .data import IGNORED, pad_left, prompts_of, tokenize


Metrics = Callable[[list[str], list[str]], dict[str, float]]


@dataclass
class Answers:
    """What a model answers to a data set's prompts.

    Args:
        nll: Negative log likelihood of the reference answers, in nats per answer token.
        predictions: Greedy answers, in the data set's order.
        references: The reference answers.
    """

    nll: float
    predictions: list[str]
    references: list[str]


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer: Any, dataset: Any, max_new_tokens: int, batch_size: int = 16, desc: str = "Answering"
) -> Answers:
    """Score and generate the answers of a data set with a base model, a stock PEFT model or one of ours.

    Args:
        model: A causal language model; logits longer than the text (stock PEFT's) are aligned at their end.
        tokenizer: Its tokenizer.
        dataset: Rows with `prompt` and `completion`.
        max_new_tokens: Most tokens of a generated answer.
        batch_size: Rows a batch.
        desc: What the progress bar says.
    """
    model.eval()
    device = next(model.parameters()).device
    rows = tokenize(dataset, tokenizer)
    rows = [
        {name: rows[index][name] for name in ("input_ids", "attention_mask", "labels")} for index in range(len(rows))
    ]
    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    total, tokens = 0.0, 0
    # Batches of prompts of one length need no padding, which stock PEFT's positions do not allow for.
    groups = defaultdict(list)
    for index, prompt in enumerate(prompts_of(*([row[name] for row in rows] for name in rows[0]))):
        groups[len(prompt)].append((index, prompt))
    predictions = [""] * len(rows)
    with tqdm(total=2 * len(rows), desc=desc, leave=False) as progress:
        for start in range(0, len(rows), batch_size):
            batch = collate([dict(row) for row in rows[start : start + batch_size]]).to(device)
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, -labels.shape[1] :]
            nll = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total, tokens = total + nll.item(), tokens + int((labels[:, 1:] != IGNORED).sum())
            progress.update(len(labels))
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                chunk = group[start : start + batch_size]
                ids, mask = pad_left([prompt for _, prompt in chunk], tokenizer.pad_token_id, device)
                generated = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
                texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
                for (index, _), text in zip(chunk, texts, strict=True):
                    predictions[index] = text
                progress.update(len(chunk))
    references = [
        tokenizer.decode([t for t in row["labels"] if t != IGNORED], skip_special_tokens=True) for row in rows
    ]
    return Answers(total / max(tokens, 1), predictions, references)


def answer_metrics(tokenizer: Any, metrics: Metrics) -> Callable[[EvalPrediction], dict[str, float]]:
    """A task's metrics on texts as `PriorTrainer`'s `compute_metrics` on token ids."""

    def decode(ids: Any) -> list[str]:
        ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
        return tokenizer.batch_decode(ids, skip_special_tokens=True)

    return lambda prediction: metrics(decode(prediction.predictions), decode(prediction.label_ids))
