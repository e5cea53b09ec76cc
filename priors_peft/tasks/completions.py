"""Any data of the user's in prompt-completion form: a file, or a data set on the Hub."""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Task, prompt_completion
from .metrics import completion_metrics


if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Pair = tuple[str, str]


def load(
    train_file: str | None = None,
    eval_file: str | None = None,
    dataset: str | None = None,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
) -> Task:
    """Load prompts and completions from files or from a data set.

    Without an `eval_file` (or, for a data set, a `validation` or `test` split), `num_eval` training rows are held out
    by `seed`: by default a tenth, at least 1 and at most 512. Training rows equal to a held-out row are dropped.

    Args:
        train_file: A `.jsonl`, `.json` (an array of objects, or one object a line) or `.csv` file in UTF-8.
        eval_file: The same for evaluation.
        dataset: Instead of files, a data set for `datasets.load_dataset`: a Hub id or a folder.
        prompt_column: Column of the prompts.
        completion_column: Column of the completions; none may be empty.
        num_train: Keep this many training rows, drawn by `seed` and in their order. `None` keeps all.
        num_eval: Keep this many evaluation rows. `None` keeps all of an evaluation file or split; 0 means none.
        seed: Which rows are kept and which held out.
        data_dir: Folder that relative `train_file` and `eval_file` are looked for in.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file can't be parsed, is empty, lacks a column, or holds an empty completion or a value that is
            not a string; the message names the file and the line.
        OSError: If the data set can't be reached.
    """
    if (train_file is None) == (dataset is None):
        raise ValueError(
            "task 'completions' needs one of train_file and dataset, "
            f"got train_file={train_file!r} and dataset={dataset!r}. Pass a .jsonl, .json or .csv file, or a Hub id"
        )
    columns = (prompt_column, completion_column)
    if train_file is not None:
        train = _read_file(_find(train_file, data_dir, "train_file"), columns)
        held_out = None
        if eval_file is not None and num_eval != 0:
            held_out = _read_file(_find(eval_file, data_dir, "eval_file"), columns)
        source = train_file
    else:
        if eval_file is not None:
            raise ValueError(
                f"eval_file goes with train_file, got {eval_file!r} with dataset={dataset!r}. Leave it out"
            )
        train, held_out = _read_dataset(str(dataset), columns, want_eval=num_eval != 0)
        source = str(dataset)

    draw = random.Random(seed)
    if held_out is None and num_eval != 0:
        train, held_out = _hold_out(draw, train, num_eval, source)
    elif held_out:
        shared = len(set(held_out) & set(train))
        if shared:
            logger.warning("%d evaluation rows of %s are training rows too, so its score flatters", shared, source)
        held_out = _keep(draw, held_out, num_eval, "num_eval", source)
    train = _keep(draw, train, num_train, "num_train", source)
    return Task(
        name="completions",
        train=prompt_completion(train),
        eval=prompt_completion(held_out) if held_out else None,
        metrics=completion_metrics,
        max_new_tokens=_max_new_tokens(train + (held_out or [])),
    )


def _max_new_tokens(rows: list[Pair]) -> int:
    """Enough for the longest completion, as no token is shorter than a byte, but no more than 256."""
    return min(256, 1 + max(len(completion.encode()) for _, completion in rows))


def _hold_out(draw: random.Random, rows: list[Pair], count: int | None, source: str) -> tuple[list[Pair], list[Pair]]:
    if count is None:
        count = max(1, min(512, len(rows) // 10))
    chosen = set(draw.sample(range(len(rows)), min(count, len(rows))))
    held_out = [row for index, row in enumerate(rows) if index in chosen]
    taken = set(held_out)
    train = [row for row in rows if row not in taken]
    if not train:
        raise ValueError(
            f"num_eval={count} rows held out of {source!r} must leave rows to train on, got {len(rows)} rows in all. "
            "Pass a smaller num_eval (0 for no evaluation), or an eval_file"
        )
    return train, held_out


def _keep(draw: random.Random, rows: list[Pair], count: int | None, argument: str, source: str) -> list[Pair]:
    if count is not None and count > len(rows):
        logger.warning("%s=%d, but %s has %d rows; all are used", argument, count, source, len(rows))
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(draw.sample(range(len(rows)), count))]


# Files.


def _find(file: str, data_dir: str | None, argument: str) -> Path:
    path = Path(data_dir or ".").expanduser() / Path(file).expanduser()
    if not path.is_file():
        where = f" in data_dir {data_dir!r}" if data_dir else f" from {str(Path.cwd())!r}"
        raise FileNotFoundError(f"{argument} must be an existing file, got {file!r}{where}. Check the path")
    return path


def _read_file(path: Path, columns: tuple[str, str]) -> list[Pair]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]]
    readers = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"a data file must be .jsonl, .json or .csv, got {str(path)!r}. Convert it or rename it")
    try:
        rows = [_pair(row, columns, f"{str(path)!r}, {place}") for place, row in readers[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8, got {error}. Save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{str(path)!r} must hold at least one row, got an empty file")
    return rows


def _pair(row: Any, columns: tuple[str, str], where: str) -> Pair:
    """The prompt and the completion of a row, checked; `where` begins the message if one is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with columns, got {type(row).__name__}")
    for argument, column in zip(("prompt_column", "completion_column"), columns, strict=True):
        if column not in row:
            raise ValueError(
                f"{where}: {argument} {column!r} is missing, the columns are {', '.join(map(str, row)) or 'none'}. "
                f"Pass {argument}"
            )
        if not isinstance(row[column], str):
            raise ValueError(
                f"{where}: {column!r} must be a string, got {row[column]!r} ({type(row[column]).__name__}). "
                "Write it as text"
            )
    prompt, completion = (row[column] for column in columns)
    if not completion.strip():
        raise ValueError(f"{where}: {columns[1]!r} must not be empty, got {completion!r}. Fill it in or drop the row")
    return prompt, completion


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{str(path)!r}, line {number}: broken JSON, {error.msg}: {line[:80]!r}"
                    ) from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r}, line {error.lineno}: broken JSON, {error.msg}") from error
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        line = 1
        try:
            names = reader.fieldnames or []
            line = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{str(path)!r}, line {line}: a row must have {len(names)} cells, got another number"
                    )
                yield f"line {line}", row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{str(path)!r}, line {line}: broken CSV, {error}") from error


# Data sets.


def _read_dataset(name: str, columns: tuple[str, str], want_eval: bool) -> tuple[list[Pair], list[Pair] | None]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except OSError as error:
        raise OSError(
            f"dataset {name!r} can't be loaded ({error}). Check the name and the network "
            "(HF_HUB_OFFLINE=1 allows only what is in the cache), or pass a file as train_file"
        ) from error
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} must have a split 'train', got {', '.join(splits)}. Pass a file instead")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    train = _pairs(splits["train"], columns, f"dataset {name!r}, split 'train'")
    if held_out is None or not want_eval:
        return train, None
    return train, _pairs(splits[held_out], columns, f"dataset {name!r}, split {held_out!r}")


def _pairs(split: Dataset, columns: tuple[str, str], where: str) -> list[Pair]:
    present = [column for column in dict.fromkeys(columns) if column in split.column_names]
    if len(present) < len(set(columns)):
        _pair(dict.fromkeys(split.column_names, "-"), columns, where)
    rows = split.select_columns(present)
    if not len(rows):
        raise ValueError(f"{where}: must hold at least one row, got none")
    return [_pair(row, columns, f"{where}, row {number}") for number, row in enumerate(rows, start=1)]
