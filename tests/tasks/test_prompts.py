"""awesome-chatgpt-prompts: any casing, more columns, and no act on both sides."""

import csv
import os
from pathlib import Path

import datasets
import pytest

from priors_peft.tasks import load_task


ROWS = [(f"Role {n}", f'I want you to act as role {n}.\nSay "{n}", always.') for n in range(30)]


def write(folder, rows=ROWS, names=("act", "prompt"), file="prompts.csv"):
    with open(folder / file, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([names, *rows])
    return str(folder)


def test_rows(tmp_path):
    task = load_task("prompts", data_dir=write(tmp_path), num_eval=0)
    assert task.train.to_list()[3] == {"prompt": "Act: Role 3\nPrompt:", "completion": f" {ROWS[3][1]}"}
    assert task.eval is None and task.description


def test_any_casing_and_more_columns(tmp_path, monkeypatch):
    expected = load_task("prompts", data_dir=write(tmp_path)).train.to_list()
    rows = [(act, "FALSE", prompt, "someone") for act, prompt in ROWS]
    write(tmp_path, rows, ("Act", "for_devs", " PROMPT", "contributor"), "prompts.csv")
    assert load_task("prompts", data_dir=str(tmp_path)).train.to_list() == expected
    assert load_task("prompts", data_dir=str(tmp_path / "prompts.csv")).train.to_list() == expected
    hub = datasets.Dataset.from_dict({"act": [act for act, _ in ROWS], "prompt": [prompt for _, prompt in ROWS], "type": ["TEXT"] * 30})  # fmt: skip
    names = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: names.append(name) or {"train": hub})
    assert load_task("prompts").train.to_list() == expected
    assert names == ["fka/awesome-chatgpt-prompts"]


def test_no_act_is_on_both_sides(tmp_path):
    folder = write(tmp_path, ROWS + [(act.upper(), prompt + " Now.") for act, prompt in ROWS])
    task = load_task("prompts", data_dir=folder, num_eval=7)
    sides = [{prompt.lower() for prompt in part["prompt"]} for part in (task.train, task.eval)]
    assert len(task.eval) == 7 and not sides[0] & sides[1]


def test_plain_text_by_an_empty_template(tmp_path):
    task = load_task("prompts", data_dir=write(tmp_path), template="", num_eval=0)
    assert task.train[0] == {"prompt": "", "completion": ROWS[0][1]}


@pytest.mark.parametrize(
    ("rows", "names", "settings", "message"),
    [
        (ROWS, ("role", "prompt"), {}, "line 2: 'act' is missing, the columns are role, prompt. Expected a CSV file"),
        ([("a", " ")], ("act", "prompt"), {}, "line 2: 'prompt' must not be empty"),
        (
            ROWS,
            ("act", "prompt"),
            {"template": "{acts}"},
            "a field in template '{acts}' must be one of act, got 'acts'. Did you mean 'act'?",
        ),
    ],
)
def test_bad_input(tmp_path, rows, names, settings, message):
    folder = write(tmp_path, rows, names)
    with pytest.raises(ValueError) as error:
        load_task("prompts", data_dir=folder, num_eval=0, **settings)
    assert message in str(error.value)


def test_a_missing_file_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompts.csv.*fka/awesome-chatgpt-prompts is loaded"):
        load_task("prompts", data_dir=str(tmp_path))


@pytest.mark.skipif("PRIORS_PEFT_DATA_DIR" not in os.environ, reason="PRIORS_PEFT_DATA_DIR is not set")
def test_real_rows():
    task = load_task("prompts", data_dir=str(Path(os.environ["PRIORS_PEFT_DATA_DIR"]) / "prompts"))
    assert len(task.eval) == 17 and len(task.train) in (152, 153)  # two of the 170 share their act
    assert sum("act as" in text for text in task.train["completion"]) > 100
