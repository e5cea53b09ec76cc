"""Reading what tasks read: rows of JSON and CSV files, data sets on the Hub, and which rows are kept or held out."""

from __future__ import annotations

import csv
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar


logger = logging.getLogger(__name__)

Placed = tuple[str, Any]  # where a row stands, for messages, and the row
Item = TypeVar("Item")


def find_file(data_dir: str, names: list[str], expected: str) -> Path:
    """The first of `names` (glob patterns) in a folder, or the folder itself if it is a file.

    Args:
        data_dir: A folder or a file.
        names: Names or patterns, the best first; a pattern that fits several files is an error.
        expected: What should be there instead, the end of the message when nothing is.

    Raises:
        FileNotFoundError: Nothing fits.
        ValueError: Several files fit one pattern.
    """
    path = Path(data_dir).expanduser()
    if path.is_file():
        return path
    for name in names:
        found = sorted(file for file in path.glob(name) if file.is_file())
        if len(found) > 1:
            raise ValueError(
                f"data_dir must hold one file {name}, got {', '.join(file.name for file in found)} in {str(path)!r}. "
                "Pass the file itself as data_dir"
            )
        if found:
            return found[0]
    there = f"which holds {_some(path)}" if path.is_dir() else "which does not exist"
    raise FileNotFoundError(f"data_dir must hold {' or '.join(names)}, got {data_dir!r}, {there}. {expected}")


def _some(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def read_rows(path: Path) -> list[Placed]:
    """The rows of a `.jsonl`, `.json` (an array, or one object a line) or `.csv` file in UTF-8, and their places.

    Raises:
        ValueError: The file can't be parsed or holds no row; the message names the file and the line.
    """
    readers: dict[str, Callable[[Path], Iterator[Placed]]] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"a data file must be .jsonl, .json or .csv, got {str(path)!r}. Convert it or rename it")
    try:
        rows = [(f"{str(path)!r}, {place}", row) for place, row in readers[path.suffix.lower()](path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8, got {error}. Save it as UTF-8") from error
    if not rows:
        raise ValueError(f"{str(path)!r} must hold at least one row, got an empty file")
    return [(where, check_row(where, row)) for where, row in rows]


def check_row(where: str, row: Any) -> dict[str, Any]:
    """A row that must be an object with columns."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a row must be an object with columns, got {type(row).__name__}")
    return row


def text_of(where: str, row: dict[str, Any], column: str, expected: str) -> str:
    """The text in a column of a row.

    Raises:
        ValueError: The column is missing or holds no string; `expected` says which columns the task reads.
    """
    if column not in row:
        raise ValueError(
            f"{where}: {column!r} is missing, the columns are {', '.join(map(str, row)) or 'none'}. {expected}"
        )
    if not isinstance(row[column], str):
        raise ValueError(
            f"{where}: {column!r} must be a string, got {row[column]!r} ({type(row[column]).__name__}). Write it as text"
        )
    return row[column]


def load_hub(name: str, config: str | None = None, instead: str = "pass a folder as data_dir") -> Any:
    """`datasets.load_dataset` of a Hub id or a folder, by split.

    Raises:
        OSError: It can't be reached; the message says what to pass instead.
        ValueError: Its files can't be read, or there is no split `train`.
    """
    import datasets
    from datasets.exceptions import DatasetBuildError

    try:
        splits = datasets.load_dataset(name) if config is None else datasets.load_dataset(name, config)
    # RuntimeError: it is a script, which `datasets` no longer runs.
    except (DatasetBuildError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"dataset {name!r} can't be built ({reason}). Check its name, mend its files, or {instead}"
        ) from error
    except OSError as error:
        raise OSError(
            f"dataset {name!r} can't be loaded ({error}). Check the name and the network "
            f"(HF_HUB_OFFLINE=1 allows only what is in the cache), or {instead}"
        ) from error
    if "train" not in splits:
        raise ValueError(f"dataset {name!r} must have a split 'train', got {', '.join(splits)}. Pass a file instead")
    return splits


def split_rows(name: str, splits: Any, split: str, columns: Iterable[str] = ()) -> list[Placed]:
    """The rows of one split and their places, with these columns alone if they are all there.

    Raises:
        ValueError: There is no such split, or it is empty.
    """
    if split not in splits:
        raise ValueError(f"dataset {name!r} must have a split {split!r}, got {', '.join(splits)}. Name one of them")
    where = f"dataset {name!r}, split {split!r}"
    if not len(splits[split]):
        raise ValueError(f"{where}: must hold at least one row, got none")
    rows, columns = splits[split], list(columns)
    if columns and set(columns) <= set(rows.column_names):
        rows = rows.select_columns(columns)  # so that no picture or sound beside them is decoded
    return [(f"{where}, row {number}", row) for number, row in enumerate(rows, start=1)]


def hold_out(
    draw: random.Random, rows: list[Item], count: int | None, source: str, key: Callable[[Item], Any] = lambda row: row
) -> tuple[list[Item], list[Item]]:
    """Training rows and `count` held-out rows (a tenth, at least 1 and at most 512, if `None`), both in their order.

    Training rows whose `key` is a held-out row's are dropped.
    """
    if count is None:
        count = max(1, min(512, len(rows) // 10))
    chosen = set(draw.sample(range(len(rows)), min(count, len(rows))))
    held_out = [row for index, row in enumerate(rows) if index in chosen]
    taken = {key(row) for row in held_out}
    train = [row for row in rows if key(row) not in taken]
    if not train:
        raise ValueError(
            f"num_eval={count} rows held out of {source!r} must leave rows to train on, got {len(rows)} rows in all. "
            "Pass a smaller num_eval (0 for no evaluation), or an evaluation file"
        )
    return train, held_out


def keep(draw: random.Random, rows: list[Item], count: int | None, argument: str, source: str) -> list[Item]:
    """`count` of the rows, drawn and in their order; all if `None`."""
    if count is not None and count > len(rows):
        logger.warning("%s=%d, but %s has %d rows; all are used", argument, count, source, len(rows))
    if count is None or count >= len(rows):
        return rows
    return [rows[index] for index in sorted(draw.sample(range(len(rows)), count))]


def _json_lines(path: Path) -> Iterator[Placed]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{str(path)!r}, line {number}: broken JSON, {error.msg}: {line[:80]!r}"
                    ) from error


def _json(path: Path) -> Iterator[Placed]:
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


def _csv(path: Path) -> Iterator[Placed]:
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
