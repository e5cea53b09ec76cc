"""What a task is, and `load_task`, which finds one by its file name in this folder."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

NOT_TASKS = {"base", "metrics"}


@dataclass
class Task:
    """Data to train and evaluate on.

    Args:
        name: The task's file name, for example `"math"`.
        train: String columns `prompt` and `completion` (TRL's prompt-completion form); the loss is on the completion.
        eval: The same columns, held out, or `None`.
        metrics: `(predictions, references) -> {"exact_match": ..., "f1": ...}`, means in [0, 1] over two lists of the
            same length.
        max_new_tokens: How many tokens a generated completion may have, end-of-sequence token included.
    """

    name: str
    train: Dataset
    eval: Dataset | None
    metrics: Callable[[list[str], list[str]], dict[str, float]]
    max_new_tokens: int


def task_names() -> list[str]:
    """The tasks there are: the modules in this folder but for `base` and `metrics`."""
    package = importlib.import_module(__package__)
    return sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - NOT_TASKS)


def load_task(
    name: str,
    *,
    data_dir: str | None = None,
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Task:
    """Load a task by name.

    Args:
        name: One of `task_names()`.
        data_dir: Folder with the task's files, where the task reads any.
        num_train: How many training rows; `None` means the task's own default.
        num_eval: How many held-out rows; `None` means the task's own default, 0 means none.
        seed: What is drawn at random (questions, the rows kept, the rows held out) is a function of it.
        kwargs: The task's own arguments; one that is `None` counts as not given.

    Raises:
        ValueError: If there is no such task, or a count makes no sense.
        TypeError: If the task does not take one of `kwargs`.
    """
    if name not in task_names():
        raise ValueError(f"task must be {unknown(name, task_names())}")
    if num_train is not None and num_train < 1:
        raise ValueError(f"num_train must be at least 1, got {num_train}. Leave it out for the task's default")
    if num_eval is not None and num_eval < 0:
        raise ValueError(f"num_eval must be at least 0, got {num_eval}. Pass 0 for no evaluation")
    load = importlib.import_module(f"{__package__}.{name}").load
    given = {"data_dir": data_dir, "num_train": num_train, "num_eval": num_eval, "seed": seed, **kwargs}
    given = {key: value for key, value in given.items() if value is not None}
    taken = inspect.signature(load).parameters
    for key in given:
        if key not in taken:
            raise TypeError(f"task {name!r} takes {', '.join(taken)}, got {key}={given[key]!r}. Leave {key} out")
    return load(**given)


def unknown(name: str, valid: Iterable[str]) -> str:
    """The end of an error about a name that is not among `valid`: what was expected, what was got, what was meant."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f". Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"one of {', '.join(valid)}; got {name!r}{hint}"


def prompt_completion(rows: Iterable[tuple[str, str]]) -> Dataset:
    """A dataset with the string columns `prompt` and `completion` from pairs."""
    from datasets import Dataset, Features, Value

    rows = list(rows)
    columns = {"prompt": [prompt for prompt, _ in rows], "completion": [completion for _, completion in rows]}
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns}))
