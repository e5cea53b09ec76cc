"""awesome-chatgpt-prompts: what to tell a chat model so that it plays a role, written from the role's name."""

import random
from typing import Any

from .base import Task, check_template, fill, prompt_completion
from .files import find_file, hold_out, keep, load_hub, read_rows, split_rows, text_of
from .metrics import token_f1


HUB_ID = "fka/awesome-chatgpt-prompts"
TEMPLATE = "Act: {act}\nPrompt:"
DESCRIPTION = "Write the instruction that makes a chat assistant act in the role that is named."
MAX_NEW_TOKENS = 64
EXPECTED = f"Expected a CSV file with the columns act and prompt, in any casing; without data_dir, {HUB_ID} is loaded"


def load(
    template: str = TEMPLATE,
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    dataset: str = HUB_ID,
) -> Task:
    """Load acts and prompts: the completion is the prompt, all of it.

    Args:
        template: What comes before it, with the field `{act}`; `""` for the prompts alone, as plain text.
        num_train: Keep this many training rows, drawn by `seed`. `None` keeps all.
        num_eval: Hold out this many rows, by default a tenth; 0 means none. No act is on both sides.
        seed: Which rows are kept and held out.
        data_dir: A folder with `prompts.csv`, or the file (`.csv`, `.jsonl` or `.json`).
        dataset: Hub id or folder for `datasets.load_dataset`, where there is no `data_dir`.

    Raises:
        FileNotFoundError: If there is no file to read.
        ValueError: If a row lacks `act` or `prompt`, or a template names another field.
        OSError: If the data set can't be reached.
    """
    check_template(template, ("act",))
    if data_dir is not None:
        path = find_file(data_dir, ["prompts.csv", "*.csv"], EXPECTED)
        placed, source = read_rows(path), str(path)
    else:
        splits = load_hub(dataset, instead="pass a folder with prompts.csv as data_dir")
        placed, source = split_rows(dataset, splits, "train"), dataset
    rows = [_row(*item) for item in placed]
    draw = random.Random(seed)
    held_out: list[tuple[dict[str, str], str]] = []
    if num_eval != 0:
        rows, held_out = hold_out(draw, rows, num_eval, source, key=lambda row: row[0]["act"].lower())
    rows = keep(draw, rows, num_train, "num_train", source)

    return Task(
        name="prompts",
        train=prompt_completion(fill(template, rows)),
        eval=prompt_completion(fill(template, held_out)) if held_out else None,
        metrics=_metrics,
        max_new_tokens=MAX_NEW_TOKENS,
        description=DESCRIPTION,
        template=template,
        dataset=None if data_dir else dataset,
    )


def _metrics(predictions: list[str], references: list[Any]) -> dict[str, float]:
    return {"f1": token_f1(predictions, references)}


def _row(where: str, row: dict[str, Any]) -> tuple[dict[str, str], str]:
    columns = {str(name).strip().lower(): value for name, value in row.items()}
    act, prompt = (text_of(where, columns, name, EXPECTED).strip() for name in ("act", "prompt"))
    if not prompt:
        raise ValueError(f"{where}: 'prompt' must not be empty, got {row!r}. Fill it in or drop the row")
    return {"act": act}, prompt
