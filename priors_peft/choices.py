"""Answers by likelihood: which of a row's choices a causal language model, with or without a prompt, finds likeliest."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from .data import IGNORED, padded_text, prompts_of, tokenize


Metrics = Callable[[list[str], list[Any]], dict[str, float]]


@torch.no_grad()
def score_choices(
    model: Any, tokenizer: Any, rows: Any, batch_size: int = 16, max_length: int | None = None
) -> list[list[float]]:
    """Log-likelihood of each choice of each row, in nats.

    A choice's score is the sum of the log-probabilities of its tokens, which are those that training would supervise but
    for the end token: log p(an answer begins with the choice). Nothing is divided by a length, so choices of different
    lengths compare as the events they are. The end token would measure how readily a base model stops there, which
    it was never taught. Only in a row where the tokens of one choice begin another's, whose events are not disjoint, all
    get it.

    Args:
        model: A causal language model: a base model, a stock PEFT model or one of ours.
        tokenizer: Its tokenizer.
        rows: A data set or list with `prompt` and `choices`, a list of completions (their leading spaces included).
        batch_size: Sequences a batch.
        max_length: Most tokens of a row, virtual tokens not counted; a longer prompt loses its start, as in training.

    Returns:
        A list for each row with a score for each choice.

    Raises:
        ValueError: A row has no choices, or a choice has no tokens.
    """
    model.eval()
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        if not row["choices"]:
            raise ValueError(f"choices must name at least one completion a row, got none in row {number}")
    pairs = [{"prompt": row["prompt"], "completion": choice} for row in rows for choice in row["choices"]]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    room = min((length for length in (max_length, context and context - virtual) if length), default=None)
    encoded = list(tokenize(Dataset.from_list(pairs), tokenizer, room))
    prompts = prompts_of(*([row[name] for row in encoded] for name in ("input_ids", "attention_mask", "labels")))
    targets = [[token for token in row["labels"] if token != IGNORED] for row in encoded]

    scores: list[list[float]] = []
    # What goes through the model, prompt and all of a choice but its last token, and whose scores are read off it:
    # choices of one token each share the prompt's pass.
    uses: dict[int, dict[tuple[int, ...], list[tuple[int, int, list[int]]]]] = defaultdict(lambda: defaultdict(list))
    start = 0
    for number, row in enumerate(rows):
        own = slice(start, start := start + len(row["choices"]))
        # The same for all, where the longest choice leaves least room.
        prompt = min(prompts[own], key=len)
        scores.append([0.0] * len(row["choices"]))
        for index, target in enumerate(_comparable(targets[own], tokenizer.eos_token_id)):
            uses[len(prompt)][(*prompt, *target[:-1])].append((number, index, target))

    device = next(model.parameters()).device
    cached_prompt = getattr(model, "cached_prompt", nullcontext)
    with cached_prompt(), tqdm(total=sum(map(len, uses.values())), desc="Scoring choices", leave=False) as progress:
        # Prompts of one length together, for the reasons given in `evaluation.answer`.
        for length, group in sorted(uses.items()):
            texts = sorted(group, key=len)
            for first in range(0, len(texts), batch_size):
                chunk = texts[first : first + batch_size]
                texts_of = padded_text([list(text) for text in chunk], tokenizer.pad_token_id or 0, "right", device)
                scored = texts_of["input_ids"].shape[1] - length + 1
                logits = model(**texts_of, logits_to_keep=scored).logits[:, -scored:]
                log_probs = logits.float().log_softmax(-1).cpu()
                for text, row_log_probs in zip(chunk, log_probs, strict=True):
                    for number, index, target in group[text]:
                        tokens = torch.tensor(target)[:, None]
                        scores[number][index] = row_log_probs[: len(target)].gather(1, tokens).sum().item()
                progress.update(len(chunk))
    return scores


def _comparable(targets: list[list[int]], end: int | None) -> list[list[int]]:
    """The choices' tokens without the end token, or with it if one choice would otherwise begin another."""
    bare = [target[:-1] if target[-1] == end and len(target) > 1 else target for target in targets]
    nested = any(other[: len(one)] == one for i, one in enumerate(bare) for j, other in enumerate(bare) if i != j)
    return targets if nested else bare


def metrics_by_likelihood(
    metrics: Metrics, model: Any, tokenizer: Any, rows: Any, batch_size: int = 16, max_length: int | None = None
) -> dict[str, float]:
    """A task's metrics of the likeliest choices: `{"accuracy_by_likelihood": ...}`; none if rows have no `choices`.

    Args:
        metrics: The task's own.
        model: As in `score_choices`; so are the rest.
        tokenizer: Its tokenizer.
        rows: With `completion` too, the right choice.
        batch_size: Sequences a batch.
        max_length: Most tokens of a row, virtual tokens not counted.
    """
    rows = list(rows)
    if not rows or "choices" not in rows[0]:
        return {}
    return scored_metrics(metrics, rows, score_choices(model, tokenizer, rows, batch_size, max_length))


def scored_metrics(metrics: Metrics, rows: Any, scores: list[list[float]]) -> dict[str, float]:
    """The same where the choices' scores are known."""
    chosen = [row["choices"][max(range(len(own)), key=own.__getitem__)] for row, own in zip(rows, scores, strict=True)]
    figures = metrics(chosen, [row["completion"] for row in rows])
    return {f"{name}_by_likelihood": value for name, value in figures.items()}
