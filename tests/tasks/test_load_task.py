"""A task is found by its file's name, and what it does not take is said."""

import pytest

from priors_peft.tasks import load_task
from priors_peft.tasks.base import task_names


def test_names_are_the_files_of_the_folder():
    assert {"math", "completions"} <= set(task_names())
    assert not {"base", "metrics"} & set(task_names())


@pytest.mark.parametrize("name", ["maths", "base", "metrics"])
def test_unknown_task_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match="completions, math") as error:
        load_task(name)
    assert repr(name) in str(error.value)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'math'"):
        load_task("maths")


def test_argument_the_task_does_not_take():
    with pytest.raises(TypeError, match="task 'math' takes module, .* got train_file='x.jsonl'"):
        load_task("math", train_file="x.jsonl")


@pytest.mark.parametrize(("argument", "value"), [("num_train", 0), ("num_eval", -1)])
def test_impossible_counts(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be at least [01], got {value}"):
        load_task("math", **{argument: value})


def test_none_means_not_given(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n')
    task = load_task("completions", train_file=str(file), eval_file=None, dataset=None, module=None)
    assert task.name == "completions"
    assert task.train.column_names == ["prompt", "completion"]
