"""DeepMind MATH: frozen, reproducible, held out for real, and correct arithmetic."""

import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import random
import re
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

from priors_peft.tasks import load_task, math


generated = pytest.mark.skipif(
    importlib.util.find_spec("mathematics_dataset") is None or importlib.util.find_spec("six") is None,
    reason="mathematics-dataset or its requirement six is not installed",
)
COMPOSED = "numbers__gcd_composed"  # one of those that vary from run to run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIORS_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(dataset):
    return [(row["prompt"], row["completion"]) for row in dataset]


@generated
def test_all_modules_are_there():
    names = math.module_names()
    assert len(names) == 56
    assert {"arithmetic__add_or_sub", "calculus__differentiate", "probability__swr_p_sequence"} <= set(names)


@generated
@pytest.mark.parametrize(
    "module",  # one of each area; together they pass through everything the shim mends
    [
        "algebra__polynomial_roots",
        "arithmetic__mixed",
        "calculus__differentiate_composed",
        "comparison__sort",
        "measurement__time",
        "numbers__is_prime",
        "polynomials__expand",
        "polynomials__coefficient_named",
        "probability__swr_p_sequence",
    ],
)
def test_a_module_generates(module):
    task = load_task("math", module=module, num_train=9, num_eval=3)
    assert (len(task.train), len(task.eval)) == (9, 3)
    for prompt, completion in rows(task.train) + rows(task.eval):
        assert re.fullmatch(r"Question: .+\nAnswer:", prompt)
        assert re.fullmatch(r" \S.*", completion)


@generated
def test_answers_are_right():
    task = load_task("math", num_train=60, num_eval=10)
    checked = 0
    for prompt, completion in rows(task.train):
        sum_of = re.fullmatch(r"Question: What is (-?[\d.]+) ([+-]) (-?[\d.]+)\?\nAnswer:", prompt)
        if sum_of:
            a, sign, b = sum_of.groups()
            assert Decimal(completion.strip()) == Decimal(a) + (Decimal(b) if sign == "+" else -Decimal(b))
            checked += 1
    assert checked > 3


@generated
def test_a_seed_names_the_same_rows_in_any_cache(tmp_path, monkeypatch):
    first = load_task("math", num_train=30, num_eval=5, seed=3)
    monkeypatch.setenv("PRIORS_PEFT_CACHE", str(tmp_path / "elsewhere"))
    again = load_task("math", num_train=30, num_eval=5, seed=3)
    other = load_task("math", num_train=30, num_eval=5, seed=4)
    assert rows(first.train) == rows(again.train) and rows(first.eval) == rows(again.eval)
    assert rows(first.train) != rows(other.train)


@generated
def test_a_smaller_draw_is_the_beginning_of_a_larger():
    assert rows(load_task("math", num_train=20).train) == rows(load_task("math", num_train=50).train)[:20]


@generated
def test_frozen_after_the_first_call(monkeypatch):
    first = load_task("math", module=COMPOSED, num_train=12, num_eval=4)
    monkeypatch.setattr(math, "_generate", lambda *_: pytest.fail("generated again"))
    again = load_task("math", module=COMPOSED, num_train=12, num_eval=4)
    assert rows(first.train) == rows(again.train) and rows(first.eval) == rows(again.eval)


@generated
def test_generators_of_the_caller_are_left_alone():
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    load_task("math", num_train=10, num_eval=2)
    assert (random.random(), np.random.rand()) == expected


@generated
def test_numpy_and_sympy_are_left_alone():
    math.module_names()
    assert "object" not in vars(np) and not hasattr(np.ndarray, "itemset")
    assert not hasattr(importlib.import_module("sympy.solvers.diophantine"), "base_solution_linear")


@generated
@pytest.mark.parametrize("split", math.EVAL_SPLITS)
def test_no_evaluation_question_is_trained_on_whatever_the_seed(monkeypatch, split):
    # A module of only 200 questions: draws that did not avoid each other would meet.
    def sampler():
        n = random.randrange(200)
        return SimpleNamespace(question=f"What is {n}?", answer=n)

    levels = [*math.LEVELS, *math.EVAL_SPLITS]
    monkeypatch.setattr(math, "_modules", lambda: {level: {"small": sampler} for level in levels})
    settings = {"module": "small", "num_train": 300, "num_eval": 50, "eval_split": split}
    tasks = [load_task("math", seed=seed, **settings) for seed in range(3)]
    train = {prompt for task in tasks for prompt in task.train["prompt"]}
    held_out = {prompt for task in tasks for prompt in task.eval["prompt"]}
    assert len(train) > 100 and len(held_out) > 20
    assert not train & held_out


@generated
def test_training_mixes_the_levels_equally():
    # Harder levels have longer numbers, so each third row in turn is longer in the mean.
    lengths = [len(prompt) for prompt in load_task("math", num_train=300, num_eval=0).train["prompt"]]
    easy, medium, hard = (np.mean(lengths[level::3]) for level in range(3))
    assert easy < medium < hard


def _load_composed(_):
    return rows(load_task("math", module=COMPOSED, num_train=30, num_eval=0).train)


@generated
@pytest.mark.slow
def test_processes_of_one_launch_get_the_same_rows():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = pool.map(_load_composed, range(2), chunksize=1)
    assert first == second


@generated
@pytest.mark.parametrize("module", ["arithmetic__add_or_subtract", "../../etc/passwd"])
def test_unknown_module(module):
    with pytest.raises(ValueError, match="module must be one of algebra__linear_1d.*got") as error:
        load_task("math", module=module)
    assert repr(module) in str(error.value)


@generated
def test_unknown_module_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'arithmetic__add_or_sub'"):
        load_task("math", module="arithmetic__add_or_subtract")


def test_missing_package_says_what_to_install(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=re.escape("pip install priors_peft[demo]")):
        load_task("math")


@generated
def test_a_group_is_an_equal_mixture_of_its_modules():
    task = load_task("math", module="measurement", num_train=41, num_eval=10)
    single = {
        name: load_task("math", module=f"measurement__{name}", num_train=count, num_eval=5)
        for name, count in (("conversion", 21), ("time", 20))
    }
    assert sorted(rows(task.train)) == sorted(row for part in single.values() for row in rows(part.train))
    assert sorted(rows(task.eval)) == sorted(row for part in single.values() for row in rows(part.eval))
    # Mixed, not one after the other.
    first = set(rows(single["conversion"].train))
    assert 5 < sum(row in first for row in rows(task.train)[:20]) < 15


@generated
def test_extrapolation_asks_for_larger_numbers_and_never_what_was_trained_on():
    settings = {"module": "arithmetic__mul", "num_train": 60, "num_eval": 60}
    near, far = (load_task("math", eval_split=split, **settings) for split in ("interpolate", "extrapolate"))
    assert rows(near.train) == rows(far.train)
    digits = [np.mean([sum(map(str.isdigit, prompt)) for prompt in task.eval["prompt"]]) for task in (near, far)]
    assert digits[1] > digits[0] + 2
    assert not set(far.eval["prompt"]) & set(far.train["prompt"])


@generated
@pytest.mark.slow
def test_only_some_modules_extrapolate():
    found = math._extrapolations(math.module_names(), math.module_names(), math._known(None, "extrapolate"))
    assert len(found) == 15
    assert found["arithmetic__mul"] == "arithmetic__mul_big"
    assert found["arithmetic__mul_div_multiple"] == "arithmetic__mul_div_multiple_longer"
    assert found["measurement__conversion"] == "measurement__conversion"
    group = load_task("math", module="comparison", eval_split="extrapolate", num_train=8, num_eval=6)
    assert len(group.eval) == 6 and len(group.train) == 8
    with pytest.raises(
        ValueError, match="'extrapolate' has questions for algebra__polynomial_roots, .*got module measurement__time"
    ):
        load_task("math", module="measurement__time", eval_split="extrapolate")
    with pytest.raises(ValueError, match="eval_split must be one of interpolate, extrapolate, got 'extrapolation'"):
        load_task("math", eval_split="extrapolation")


@generated
def test_another_template():
    plain, other = (
        load_task("math", num_train=3, num_eval=0),
        load_task("math", num_train=3, num_eval=0, template="{question}\n"),
    )
    for (prompt, answer), (question, bare) in zip(rows(plain.train), rows(other.train), strict=True):
        assert prompt == f"Question: {question}Answer:" and answer == f" {bare}"
    with pytest.raises(ValueError, match="a field in template '{answer}' must be one of question, got 'answer'"):
        load_task("math", template="{answer}")


# The published files.


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "mathematics_dataset-v1.0"
    for level in ("train-easy", "train-medium", "train-hard", "interpolate"):
        (folder / level).mkdir(parents=True)
        lines = [f"What is {level} {n}?\n{n}\n" for n in range(8)]
        if level == "interpolate":
            lines[:4] = [f"What is train-hard {n}?\n{n}\n" for n in range(4)]
        (folder / level / "arithmetic__mul.txt").write_text("".join(lines))
    return folder


def test_published_files(published, monkeypatch):
    monkeypatch.setattr(math, "_generate", lambda *_: pytest.fail("generated"))
    task = load_task("math", module="arithmetic__mul", data_dir=str(published), num_train=10, num_eval=4)
    counts = [sum(level in prompt for prompt in task.train["prompt"]) for level in math.LEVELS]
    assert counts == [4, 3, 3]
    # Four of the eight held-out questions are training questions and go, though not all of those were drawn.
    assert sorted(rows(task.eval)) == [(f"Question: What is interpolate {n}?\nAnswer:", f" {n}") for n in range(4, 8)]
    again = load_task("math", module="arithmetic__mul", data_dir=str(published), num_train=10, num_eval=4)
    assert rows(task.train) == rows(again.train)


def test_published_groups_and_extrapolation(published):
    for level in math.LEVELS:
        (published / level / "arithmetic__div.txt").write_text(f"Divide {level}\n1\nDivide twice {level}\n2\n")
    (published / "interpolate" / "arithmetic__div.txt").write_text("Divide\n1\nDivide twice\n2\n")
    (published / "extrapolate").mkdir()
    (published / "extrapolate" / "arithmetic__mul_big.txt").write_text("Multiply big\n9\n")
    settings = {"module": "arithmetic", "data_dir": str(published), "num_train": 6}
    task = load_task("math", num_eval=4, **settings)
    assert sum("Divide" in prompt for prompt in task.train["prompt"]) == 3 == len(task.train) - 3
    assert sum("Divide" in prompt for prompt in task.eval["prompt"]) == 2 == len(task.eval) - 2
    far = load_task("math", eval_split="extrapolate", num_eval=1, **settings)
    assert rows(far.eval) == [("Question: Multiply big\nAnswer:", " 9")] and rows(far.train) == rows(task.train)


@pytest.mark.parametrize(("argument", "count"), [("num_train", 25), ("num_eval", 5)])
def test_published_files_with_too_few_questions(published, argument, count):
    with pytest.raises(ValueError, match=f"{argument} asks for"):
        load_task("math", module="arithmetic__mul", data_dir=str(published), **{"num_train": 3, "num_eval": 2, argument: count})  # fmt: skip


def test_published_folder_without_the_module(published):
    with pytest.raises(ValueError, match="module must be one of arithmetic__mul, got 'arithmetic__mull'"):
        load_task("math", module="arithmetic__mull", data_dir=str(published), num_train=3, num_eval=1)


def test_data_dir_that_is_no_published_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_dir must hold the published data set.*train-easy"):
        load_task("math", data_dir=str(tmp_path), num_train=3, num_eval=0)


def test_published_file_cut_short(published):
    with open(published / "train-easy" / "arithmetic__mul.txt", "a") as file:
        file.write("A question without its answer\n")
    with pytest.raises(ValueError, match="odd number of lines, 17"):
        load_task("math", module="arithmetic__mul", data_dir=str(published), num_train=3, num_eval=1)
