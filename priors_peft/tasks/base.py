"""What a task is, and `load_task`, which finds one by its file name in this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..names import did_you_mean, unknown


if TYPE_CHECKING:
    from datasets import Dataset

NOT_TASKS = {"base", "files", "metrics"}


@dataclass
class Task:
    """Data to train and evaluate on.

    Args:
        name: The task's file name, and its subtask's if it has some: `"math"`, `"superglue:rte"`.
        train: String columns `prompt` and `completion` (TRL's prompt-completion form); the loss is on the completion.
        eval: The same columns, held out, or `None`. Two more where the task has them: `answers`, the texts any of
            which is right, and `choices`, the completions whose likelihoods are compared; lists of strings.
        metrics: `(predictions, references) -> {"exact_match": ..., "f1": ...}`, means in [0, 1] over two lists of the
            same length. A reference is a row's `answers` if it has any, else its completion.
        max_new_tokens: How many tokens a generated completion may have, end-of-sequence token included.
        description: What the task asks for, in a sentence or two of English.
        template: How a prompt is made, a format string, where there is one.
        dataset: The data set for `datasets.load_dataset` that the rows are from, where they are.
    """

    name: str
    train: Dataset
    eval: Dataset | None
    metrics: Callable[[list[str], list[Any]], dict[str, float]]
    max_new_tokens: int
    description: str = ""
    template: str = ""
    dataset: str | None = None


def task_names() -> list[str]:
    """The tasks there are: the modules in this folder but for those that all tasks share."""
    package = importlib.import_module(__package__)
    return sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - NOT_TASKS)


def full_name(name: str) -> str:
    """A task's one name: of `"rte"` it is `"superglue:rte"`, as one task alone has such a subtask.

    Args:
        name: A task's, with `:` and a subtask's or without, or a subtask's alone.

    Raises:
        ValueError: There is no such task or subtask, or several tasks have it; no data is loaded to find that out.
    """
    if name in task_names():
        return name
    task, colon, subtask = name.partition(":")
    if colon and task in task_names():
        if subtask.lower() not in _subtasks(task):
            raise ValueError(f"task must name a subtask after {task}: {unknown(subtask, _subtasks(task))}")
        return f"{task}:{subtask.lower()}"
    owners = [task for task in task_names() if name.lower() in _subtasks(task)]
    if len(owners) > 1:
        raise ValueError(f"task must be one of {', '.join(f'{task}:{name.lower()}' for task in owners)}, got {name!r}")
    if not owners:
        raise ValueError(f"task must be {unknown(name, task_names())}")
    return f"{owners[0]}:{name.lower()}"


def _subtasks(task: str) -> list[str]:
    return list(getattr(importlib.import_module(f"{__package__}.{task}"), "SUBTASKS", ()))


def load_task(
    name: str,
    *,
    data_dir: str | None = None,
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    max_length: int | None = None,
    **kwargs: Any,
) -> Task:
    """Load a task by name.

    Args:
        name: One of `task_names()`; a subtask may follow (`"superglue:rte"`) or stand alone (`"rte"`).
        data_dir: Folder with the task's files, where the task reads any.
        num_train: How many training rows; `None` means the task's own default.
        num_eval: How many held-out rows; `None` means the task's own default, 0 means none.
        seed: What is drawn at random (questions, the rows kept, the rows held out) is a function of it.
        tokenizer: The base model's, for tasks that cut what is too long or use its chat template; others ignore it.
        max_length: Most tokens of a row, without virtual tokens, for tasks that cut; others ignore it.
        kwargs: The task's own arguments; one that is `None` counts as not given.

    Raises:
        ValueError: If there is no such task, or a count makes no sense.
        TypeError: If the task does not take one of `kwargs`.
    """
    name, _, subtask = full_name(name).partition(":")
    if subtask:
        if kwargs.get("subtask") not in (None, subtask):
            raise ValueError(f"subtask must be {subtask!r} with task={name}:{subtask}, got {kwargs['subtask']!r}")
        kwargs["subtask"] = subtask
    if num_train is not None and not (isinstance(num_train, int) and num_train >= 1):
        raise ValueError(f"num_train must be at least 1, got {num_train!r}. Leave it out for the task's default")
    if num_eval is not None and not (isinstance(num_eval, int) and num_eval >= 0):
        raise ValueError(f"num_eval must be at least 0, got {num_eval!r}. Pass 0 for no evaluation")
    load = importlib.import_module(f"{__package__}.{name}").load
    given = {"data_dir": data_dir, "num_train": num_train, "num_eval": num_eval, "seed": seed, **kwargs}
    taken = inspect.signature(load).parameters
    given |= {key: value for key, value in (("tokenizer", tokenizer), ("max_length", max_length)) if key in taken}
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in taken:
            hint = did_you_mean(key, taken) or f". Leave {key} out"
            raise TypeError(f"task {name!r} takes {', '.join(taken)}, got {key}={given[key]!r}{hint}")
    return load(**given)


def check_template(template: str, fields: Iterable[str], argument: str = "template") -> None:
    """Refuse a format string that `str.format` could not fill in from `fields`.

    Raises:
        ValueError: It is no string, its braces don't match, or it names a field that is not there.
    """
    fields = list(fields)
    if not isinstance(template, str):
        raise ValueError(
            f"{argument} must be text, got {template!r} ({type(template).__name__}). Put it in quotes in YAML"
        )
    try:
        parts = list(string.Formatter().parse(template))
        names = [name + (f":{spec}" if spec else "") for _, name, spec, _ in parts if name is not None]
    except ValueError as error:
        raise ValueError(
            f"{argument} must be a Python format string with fields like {{{fields[0]}}}, got {template!r} ({error}). "
            "Write a brace that is no field twice"
        ) from error
    for name in names:
        if name not in fields:
            raise ValueError(f"a field in {argument} {template!r} must be {unknown(name, fields)}")


def follow(prompt: str, text: str) -> str:
    """`text` as the completion of `prompt`: after a space, unless the prompt is empty or ends in white space."""
    return f" {text}" if prompt and not prompt[-1].isspace() else text


def fill(template: str, rows: Iterable[tuple[dict[str, str], str]]) -> list[tuple[str, str]]:
    """Prompts and completions of rows of a template's fields and an answer."""
    return [(prompt := template.format_map(fields), follow(prompt, text)) for fields, text in rows]


def longest(completions: Iterable[str]) -> int:
    """Tokens enough for the longest completion and the end, as no token is shorter than a byte; at most 256."""
    return min(256, 1 + max(len(completion.encode()) for completion in completions))


def prompt_completion(rows: Iterable[tuple[str, str]], **lists: Iterable[list[str]]) -> Dataset:
    """A dataset with the string columns `prompt` and `completion` from pairs, and columns of lists of strings."""
    from datasets import Dataset, Features, List, Value

    rows = list(rows)
    columns: dict[str, list[Any]] = {
        "prompt": [prompt for prompt, _ in rows],
        "completion": [text for _, text in rows],
    }
    features: dict[str, Any] = {name: Value("string") for name in columns}
    features |= {name: List(Value("string")) for name in lists}
    columns |= {name: list(values) for name, values in lists.items()}
    return Dataset.from_dict(columns, features=Features(features))
