"""A task is found by its file's name, and what it does not take is said."""

import importlib
import inspect
from pathlib import Path

import pytest

from priors_peft.tasks import load_task, math, prompts, squad, superglue
from priors_peft.tasks.base import check_template, follow, full_name, task_names


def test_names_are_the_files_of_the_folder():
    assert task_names() == ["completions", "math", "prompts", "squad", "superglue"]


@pytest.mark.parametrize("name", ["maths", "base", "files", "metrics"])
def test_unknown_task_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match="completions, math, prompts, squad, superglue") as error:
        load_task(name)
    assert repr(name) in str(error.value)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'math'"):
        load_task("maths")


@pytest.mark.parametrize("name", ["rte", "RTE", "superglue:rte", "superglue:RTE"])
def test_a_subtask_has_one_full_name(name, tmp_path):
    assert full_name(name) == "superglue:rte"
    (tmp_path / "train.jsonl").write_text('{"premise": "a", "hypothesis": "b", "label": "entailment"}\n')
    given = {"data_dir": str(tmp_path), "num_eval": 0}
    task = load_task(name, **given)
    assert task.name == load_task("superglue", subtask="rte", **given).name == "superglue:rte"
    assert task.train.to_list() == load_task("superglue", **given).train.to_list()


def test_tasks_without_subtasks_are_their_own_names():
    assert [full_name(name) for name in task_names()] == task_names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "superglue:rtee",
            "task must name a subtask after superglue: one of rte, .* got 'rtee'. Did you mean 'rte'",
        ),
        ("math:rte", "task must name a subtask after math"),
        ("glue:rte", "task must be one of completions, .* got 'glue:rte'"),
    ],
)
def test_unknown_subtasks_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        full_name(name)


def test_a_subtask_is_named_once():
    with pytest.raises(ValueError, match="subtask must be 'rte' with task=superglue:rte, got 'wsc'"):
        load_task("rte", subtask="wsc")


def test_a_subtask_of_several_tasks_must_be_told_apart(monkeypatch):
    monkeypatch.setattr(math, "SUBTASKS", {"rte": None}, raising=False)
    with pytest.raises(ValueError, match="task must be one of math:rte, superglue:rte, got 'rte'"):
        full_name("rte")


def test_argument_the_task_does_not_take():
    with pytest.raises(TypeError, match="task 'math' takes module, .* got train_file='x.jsonl'"):
        load_task("math", train_file="x.jsonl")


@pytest.mark.parametrize(
    ("argument", "value"), [("num_train", 0), ("num_eval", -1), ("num_train", "ten"), ("num_eval", 0.5)]
)
def test_impossible_counts(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least [01], got {value!r}"):
        load_task("math", **{argument: value})


def test_none_means_not_given(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n')
    task = load_task("completions", train_file=str(file), eval_file=None, dataset=None, module=None)
    assert task.name == "completions"
    assert task.train.column_names == ["prompt", "completion"]


def test_a_tokenizer_and_a_length_are_given_to_the_tasks_that_take_them(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text("act,prompt\na,b\n")
    load_task("prompts", data_dir=str(file), num_eval=0, tokenizer=object(), max_length=3)
    rows = tmp_path / "train.json"
    rows.write_text('[{"context": "c", "question": "q", "answer": "c"}]')
    with pytest.raises(TypeError, match="'object' object is not callable"):
        load_task("squad", data_dir=str(rows), num_eval=0, tokenizer=object(), max_length=3)


@pytest.mark.parametrize("name", task_names())
def test_a_task_says_in_english_what_it_asks_for(name):
    load = importlib.import_module(f"priors_peft.tasks.{name}").load
    assert {"num_train", "num_eval", "seed", "data_dir"} <= set(inspect.signature(load).parameters)
    # Of the user's own data nothing is known.
    descriptions = {"math": [math.DESCRIPTION], "squad": [squad.DESCRIPTION], "prompts": [prompts.DESCRIPTION]}
    descriptions["superglue"] = [subtask.description for subtask in superglue.SUBTASKS.values()]
    assert all(text.endswith(".") and len(text.split()) > 8 for text in descriptions.get(name, []))


def test_what_follows_a_prompt():
    assert [follow(prompt, "a") for prompt in ("", "q:", "q: ", "q:\n")] == ["a", " a", "a", "a"]


def test_values_with_braces_are_left_as_they_are():
    check_template("{{a}} {b}", ["b"])
    assert "{{a}} {b}".format(b="{c}") == "{a} {c}"
    with pytest.raises(ValueError, match="must be one of b, got 'b:>10'"):
        check_template("{b:>10}", ["b"])


def test_the_page_shows_every_template_and_hub_id():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    templates = [squad.TEMPLATE, math.TEMPLATE, prompts.TEMPLATE, *(s.template for s in superglue.SUBTASKS.values())]
    for shown in [*(template.replace("\n", "⏎") for template in templates), *squad.HUB_IDS.values()]:
        assert f"`{shown}`" in page
    assert superglue.HUB_ID in page and prompts.HUB_ID in page
    for name, subtask in superglue.SUBTASKS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{part}`" in row for part in (*subtask.fields, *subtask.verbalizer))
