"""From rows of text to token ids whose labels cover the completion only."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .tasks.base import prompt_completion
from .tasks.completions import pairs_of


logger = logging.getLogger(__name__)

IGNORED = -100
_TOKENIZED, _PAIR = {"input_ids", "labels"}, ("prompt", "completion")


def tokenize(dataset: Any, tokenizer: Any, max_length: int | None = None) -> Dataset | IterableDataset:
    """Tokenize rows in one of the forms of `tasks.completions`: prompt and completion, messages, or plain text.

    Prompt and completion are tokenized apart, so that generation sees exactly the prompt that training saw, and the
    completion ends with the end-of-sequence token. An empty prompt becomes the token that starts a text. A row that is
    too long loses the start of its prompt, never its answer, unless the completion alone is too long; then it loses the
    completion's end.

    Args:
        dataset: Rows with string columns `prompt` and `completion`, with `messages` (needs a chat template) or with
            `text`, all of which is learnt; or with `input_ids` and `labels`, which are left as they are. A list of rows
            will do.
        tokenizer: The base model's tokenizer.
        max_length: Most tokens of a row, without virtual tokens; None for no limit.

    Returns:
        Columns `input_ids`, `attention_mask` and `labels`.

    Raises:
        ValueError: There are no rows, a column is missing, a value is no text, or a completion has no tokens.
    """
    if isinstance(dataset, list):
        dataset = _from_list(dataset, tokenizer)
    columns = _columns(dataset)
    if _TOKENIZED <= set(columns):
        return dataset
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    start = end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    cut: list[int] = []

    def encode(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        placed = [
            (f"row {index}", dict(zip(rows, values, strict=True)))
            for index, values in zip(indices, zip(*rows.values(), strict=True), strict=True)
        ]
        pairs = pairs_of(placed, _PAIR, tokenizer)
        texts = [prompt for prompt, _ in pairs]
        prompts = tokenizer(texts)["input_ids"]
        completions = tokenizer([completion for _, completion in pairs], add_special_tokens=False)["input_ids"]
        encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for index, text, prompt, completion in zip(indices, texts, prompts, completions, strict=True):
            if not completion:
                raise ValueError(f"completion must have tokens, got none in row {index}: fill it in or drop the row")
            prompt = prompt or start
            completion = completion + [token for token in end if completion[-1] != token]
            if max_length is not None and len(prompt) + len(completion) > max_length:
                cut.append(index)
                # Plain text that is cut starts as plain text that is not.
                completion = completion[: max_length if text else max(1, max_length - len(prompt))]
                prompt = prompt[max(0, len(prompt) + len(completion) - max_length) :]
            encoded["input_ids"].append(prompt + completion)
            encoded["attention_mask"].append([1] * len(encoded["input_ids"][-1]))
            encoded["labels"].append([IGNORED] * len(prompt) + completion)
        return encoded

    progress = {} if isinstance(dataset, IterableDataset) else {"desc": "Tokenizing"}
    tokenized = dataset.map(encode, batched=True, with_indices=True, remove_columns=columns, **progress)
    if isinstance(tokenized, Dataset):
        if cut:
            logger.warning(
                "%d of %d rows are longer than max_length=%d: a prompt loses its start, plain text and a long completion their end",
                len(cut),
                len(tokenized),
                max_length,
            )
    return tokenized


def _from_list(rows: list[Any], tokenizer: Any) -> Dataset:
    other = next((type(row).__name__ for row in rows if not isinstance(row, Mapping)), None)
    if other is not None:
        raise ValueError(f"dataset must be a datasets.Dataset or a list of rows as dictionaries, got {other} in it")
    columns = _checked(list(rows[0]) if rows else [])
    if _TOKENIZED <= set(columns):
        return Dataset.from_list(rows)
    # Before they are a table, which would not say what is wrong with which row.
    placed = [(f"row {index}", dict.fromkeys(columns) | dict(row)) for index, row in enumerate(rows)]
    return prompt_completion(pairs_of(placed, _PAIR, tokenizer))


def _columns(dataset: Any) -> list[str]:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"dataset must be a datasets.Dataset or a list of rows, got {type(dataset).__name__}: "
            "datasets.Dataset.from_list(list(dataset)) makes one"
        )
    return _checked(dataset.column_names or list(next(iter(dataset), {})))


def _checked(columns: list[str]) -> list[str]:
    if not columns:
        raise ValueError("dataset must hold at least one row, got none")
    if not any(form <= set(columns) for form in (_TOKENIZED, set(_PAIR), {"messages"}, {"text"})):
        raise ValueError(f"dataset must have the columns prompt and completion, messages, or text, got {columns}")
    return columns


def count_supervised_tokens(dataset: Dataset) -> int:
    """Number N of supervised tokens in a tokenized dataset."""
    return sum(len(row) - row.count(IGNORED) for row in dataset.with_format(None)["labels"])


def model_inputs(row: dict[str, Any]) -> dict[str, Any]:
    """What a collator takes of a tokenized row."""
    return {name: row[name] for name in ("input_ids", "attention_mask", "labels") if name in row}


def prompts_of(
    input_ids: list[list[int]], attention_mask: list[list[int]], labels: list[list[int]]
) -> list[list[int]]:
    """The part of each row that comes before its first supervised token, without padding."""
    prompts = []
    for row, mask, targets in zip(input_ids, attention_mask, labels, strict=True):
        first = answer_start(targets)
        prompts.append([token for token, kept in zip(row[:first], mask[:first], strict=True) if kept])
    return prompts


def answer_start(labels: list[int]) -> int:
    """Where a row's first supervised token stands; its length if it has none."""
    return next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))


def pad(rows: list[list[int]], value: int, side: Literal["left", "right"]) -> Tensor:
    """Rows of different lengths as one tensor `[B, L]`, `value` filling the given side."""
    length = max(1, *map(len, rows)) if rows else 1
    fills = [[value] * (length - len(row)) for row in rows]
    return torch.tensor([fill + row if side == "left" else row + fill for fill, row in zip(fills, rows, strict=True)])


def padded_text(
    rows: list[list[int]], pad_token_id: int, side: Literal["left", "right"], device: torch.device
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, L]` of rows of different lengths."""
    mask = pad([[1] * len(row) for row in rows], 0, side)
    return {"input_ids": pad(rows, pad_token_id, side).to(device), "attention_mask": mask.to(device)}
