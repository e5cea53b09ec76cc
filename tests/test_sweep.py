"""A sweep is the grid that its file says, each run once, and goes on from where it was stopped."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import addition_rows, save_base


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module("sweep")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


GRID = """model: base
grid:
  seed: [0, 1]
  prior:
    gaussian:
    narrow: {prior: gaussian, prior_kwargs: {scale: 0.02}, max_steps: 7}
"""


def test_a_grid_is_every_combination_with_the_last_axis_fastest(tmp_path, sweep):
    runs = sweep.read_sweep(write(tmp_path / "grid.yaml", GRID), [])
    assert [run.name for run in runs] == ["0-gaussian", "0-narrow", "1-gaussian", "1-narrow"]
    model, _, prompt, args = runs[3].parsed()
    assert (model.model, prompt.prior, prompt.prior_kwargs) == ("base", "gaussian", {"scale": 0.02})
    assert (args.seed, args.max_steps) == (1, 7)


def test_flags_choose_labels_set_a_labels_flag_and_win_over_the_file(tmp_path, sweep):
    path = write(tmp_path / "grid.yaml", GRID)
    flags = ["--seed", "3", "4", "--prior", "narrow", "--narrow.prior_kwargs", '{"scale": 1}', "--max_steps=2"]
    runs = sweep.read_sweep(path, flags)
    assert [run.name for run in runs] == ["3-narrow", "4-narrow"]
    _, _, prompt, args = runs[0].parsed()
    assert (prompt.prior_kwargs, args.seed, args.max_steps) == ({"scale": 1}, 3, 2)


def test_a_sweep_can_be_a_part_or_a_change_of_another(tmp_path, sweep):
    write(tmp_path / "grid.yaml", GRID)
    text = "recipe: grid.yaml\nmodel: other\ngrid:\n  prior: [narrow]\n  seed: [5]\n"
    (run,) = sweep.read_sweep(write(tmp_path / "part.yaml", text), [])
    assert (run.name, run.settings["model"]) == ("5-narrow", "other")
    text = "recipe: grid.yaml\ngrid:\n  prior:\n    narrow: {max_steps: 9}\n"
    runs = sweep.read_sweep(write(tmp_path / "changed.yaml", text), [])
    assert len(runs) == 4
    assert runs[1].settings["max_steps"] == 9 and runs[1].settings["prior_kwargs"] == {"scale": 0.02}


@pytest.mark.parametrize("grid", ["[no, steps]", "{no: {}, steps: {max_steps: 3}}"])
def test_a_value_on_an_axis_means_what_it_means_after_its_flag(grid, tmp_path, sweep):
    runs = sweep.read_sweep(write(tmp_path / "grid.yaml", f"model: m\ngrid:\n  save_strategy: {grid}\n"), [])
    assert [(run.name, run.parsed()[-1].save_strategy) for run in runs] == [("no", "no"), ("steps", "steps")]


@pytest.mark.parametrize(
    "text, flags, message",
    [
        ("model: m\n", [], "must have a grid"),
        ("grid:\n  sed: [0]\n", [], "line 2: 'sed' is no flag. Did you mean 'seed'?"),
        ("grid:\n  a:\n    b:\n      sed: 0\n", [], "line 4: 'sed' is no flag. Did you mean 'seed'?"),
        ("grid:\n  seed: 0\n", [], "line 2: seed must list values or map labels to flags, got 0"),
        ("grid:\n  seed: []\n", [], "seed must list values"),
        ("grid:\n  prior: [a b]\n", [], "labels must be letters"),
        ("grid:\n  on: [1]\n", [], "line 2: 'on' is no flag"),
        ("grid:\n  seed: [0, one]\n", [], "line 2: argument --seed: invalid int value: 'one'"),
        ("grid:\n  a: {x: {}, x-y: {}}\n  b: {y-z: {}, z: {}}\n", [], "got 'x-y-z' twice"),
        (GRID, ["--prior", "narow"], "prior must be one of gaussian, narrow, got 'narow'. Did you mean 'narrow'?"),
        (
            GRID,
            ["--narow.seed", "0"],
            "--narow.seed must be --LABEL.FLAG VALUE with a label among 0, 1, gaussian, narrow",
        ),
        (GRID, ["narrow"], "'narrow' is no flag"),
    ],
)
def test_a_grid_that_makes_no_sense_is_an_error_with_its_place(text, flags, message, tmp_path, sweep):
    with pytest.raises(ValueError) as error:
        sweep.read_sweep(write(tmp_path / "grid.yaml", text), flags)
    assert message in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(RECIPES.glob("paper/*.yaml")), ids=lambda path: path.stem)
def test_the_papers_sweeps_are_runs_that_train_takes(path, sweep):
    if path.stem == "run":
        return
    runs = sweep.read_sweep(str(path), [])
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        run.parsed()


def test_a_run_takes_as_long_as_those_most_like_it(sweep):
    done = [{"labels": {"task": "a", "seed": "0"}, "seconds": 2}, {"labels": {"task": "b", "seed": "0"}, "seconds": 9}]
    assert sweep.expected(sweep.Run({"task": "b", "seed": "1"}, {}, []), done) == 9
    assert sweep.expected(sweep.Run({"task": "c", "seed": "0"}, {}, []), done) == 5.5
    assert sweep.expected(sweep.Run({"task": "b", "seed": "1"}, {}, []), []) is None


@pytest.fixture
def small(tmp_path) -> list[str]:
    """A sweep of two runs, as a command line."""
    rows = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    text = f"""model: {save_base(tmp_path / "base")}
train_file: {rows}
output_dir: {tmp_path / "out"}
num_eval: 8
num_virtual_tokens: 4
max_steps: 4
save_steps: 1
prediction_loss_only: true
use_cpu: true
disable_tqdm: true
grid:
  prior: [gaussian, structured]
"""
    return [write(tmp_path / "small.yaml", text)]


def results(tmp_path: Path) -> dict[str, dict]:
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    return {record["run"]: record for record in map(json.loads, lines)}


@pytest.mark.slow
def test_each_run_is_done_once_and_leaves_a_line(small, tmp_path, sweep, capsys, monkeypatch):
    sweep.main(small)
    found = results(tmp_path)
    assert set(found) == {"gaussian", "structured"}
    for name, record in found.items():
        adapter = tmp_path / "out" / "runs" / name
        trained = json.loads((adapter / "eval_results.json").read_text())
        assert record["results"]["loss"] == trained["eval_loss"] and "exact_match" not in record["results"]
        assert record["flags"].get("prior", "structured") == name
        assert record["steps"] == 4 and str(tmp_path) not in json.dumps(record)
    written = (tmp_path / "out" / "runs" / "gaussian" / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    sweep.main([*small, "--prior", "gaussian", "exclusion", "--exclusion.prior_weight", "0"])
    assert "2 runs in" in (printed := capsys.readouterr().out) and "1 of them done" in printed
    assert (tmp_path / "out" / "runs" / "gaussian" / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert set(results(tmp_path)) == {"gaussian", "structured", "exclusion"}
    assert "min left" in printed
    with pytest.raises(ValueError, match="max_steps must be 4 as when the run gaussian was begun, got 5"):
        sweep.main([*small, "--max_steps", "5"])
    with pytest.raises(ValueError, match="prediction_loss_only must be True as when the run gaussian was begun"):
        sweep.main([*small, "--prediction_loss_only", "false"])
    with pytest.raises(ValueError, match="posterior_draws must be 8 as when the run gaussian was begun, got 2"):
        sweep.main([*small, "--posterior_draws", "2"])
    with pytest.raises(ValueError, match="adam_beta2 must be 0.999 as when the run gaussian was begun, got 0.9"):
        sweep.main([*small, "--adam_beta2", "0.9"])
    rows = tmp_path / "rows.jsonl"
    moved = write(tmp_path / "other.jsonl", rows.read_text())
    with pytest.raises(ValueError, match="train_file must be '.*rows.jsonl' as when the run gaussian .*other.jsonl"):
        sweep.main([*small, "--train_file", moved])
    shutil.rmtree(tmp_path / "out" / "runs")  # what has a line is done all the same
    with pytest.raises(ValueError, match="max_steps must be 4 as when the run gaussian was begun, got 5"):
        sweep.main([*small, "--max_steps", "5"])
    monkeypatch.chdir(tmp_path)
    sweep.main([*small, "--train_file", "rows.jsonl"])  # the same place


def test_a_setting_that_an_older_version_did_not_know_counts_as_its_default(small, tmp_path, sweep):
    runs = sweep.read_sweep(small[0], ["--prior", "gaussian"])
    sweep.plan(tmp_path, runs, [])
    older = json.loads((tmp_path / sweep.PLANNED).read_text())
    assert older["gaussian"].pop("coordinates") == "whitened" and older["gaussian"].pop("num_eval") == 8
    write(tmp_path / sweep.PLANNED, json.dumps({"gaussian": older["gaussian"] | {"num_eval": 8}}))
    sweep.plan(tmp_path, runs, ["gaussian"])
    write(tmp_path / sweep.PLANNED, json.dumps(older))
    with pytest.raises(ValueError, match="num_eval must be None as when the run gaussian was begun, got 8"):
        sweep.plan(tmp_path, runs, ["gaussian"])


@pytest.mark.slow
def test_runs_over_one_loaded_model_are_what_each_is_alone(small, tmp_path, sweep):
    sweep.main(small)
    together = results(tmp_path)
    sweep.main([*small, "--prior", "structured", "--output_dir", str(tmp_path / "alone")])
    line = (tmp_path / "alone" / "results.jsonl").read_text()
    assert json.loads(line)["results"]["loss"] == together["structured"]["results"]["loss"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_within_its_run_and_ends_as_one_that_was_not(small, tmp_path, sweep):
    flags = ["--prior", "gaussian", "--max_steps", "40", "--eval_on_start", "true"]
    sweep.main([*small, *flags, "--output_dir", str(tmp_path / "whole")])
    command = [sys.executable, str(RECIPES / "sweep.py"), *small, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    state = tmp_path / "out" / "runs" / "gaussian"
    while process.poll() is None and not (state / "checkpoint-3" / "trainer_state.json").is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "results.jsonl").exists(), (tmp_path / "log").read_text()
    begun = (state / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns
    sweep.main([*small, *flags])
    assert (state / "checkpoint-1" / "trainer_state.json").stat().st_mtime_ns == begun, "the run began anew"
    expected = json.loads((tmp_path / "whole" / "results.jsonl").read_text())
    (found,) = results(tmp_path).values()
    assert found["results"]["loss"] == expected["results"]["loss"]
    assert found["initial_results"]["loss"] == expected["initial_results"]["loss"]
