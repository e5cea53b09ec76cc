"""`priors-peft transfer`: each cell is what the prompt alone gives, is measured once, and joins what `analyze` wrote."""

import json
from functools import partial

import pytest
import torch
from conftest import SUPERGLUE_KWARGS, save_base, write_superglue

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model, load_base_model
from priors_peft.analysis import matrix
from priors_peft.choices import metrics_by_likelihood, score_choices
from priors_peft.cli import main
from priors_peft.commands import transfer as command
from priors_peft.commands.analyze import keep_transfer
from priors_peft.hub.adapter import read_task
from priors_peft.tasks import load_task


TASKS = ["rte", "wic", "boolq"]
KWARGS = {name.split(":")[1]: settings for name, settings in SUPERGLUE_KWARGS.items() if name != "superglue:wsc"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, data, and two prompts for each of three tasks."""
    folder = tmp_path_factory.mktemp("transfer")
    base, tokenizer = load_base_model(save_base(folder / "base"), device="cpu")
    write_superglue(folder / "data")
    for number, task in enumerate(TASKS * 2):
        config = PriorConfig(num_virtual_tokens=3, prior="gaussian", seed=number)
        model = get_prior_model(base, config, tokenizer=tokenizer)
        model.save_pretrained(str(folder / f"{task}-{number // 3}"))
        (folder / f"{task}-{number // 3}" / "task.json").write_text(json.dumps({"task": f"superglue:{task}"}))
    return folder


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch):
    monkeypatch.setattr(command, "draw", lambda folder: None)
    monkeypatch.setattr(matrix, "transfer_correlation", partial(matrix.transfer_correlation, num_resamples=20))


def run(place, out, *flags, adapters=None, tasks=TASKS):
    adapters = adapters or [f"{task}-{seed}" for task in TASKS for seed in (0, 1)]
    given = ["--tasks", *tasks, "--data_dir", str(place / "data"), "--num_eval", "8", "--num_permutations", "50"]
    own = {task: settings for task, settings in KWARGS.items() if task in tasks}
    return main(["transfer", *(str(place / name) for name in adapters), *given, "--task_kwargs", json.dumps(own), "--out", str(out), *flags])  # fmt: skip


def part_of(out):
    return json.loads((out / "analysis.json").read_text())["transfer"]


@pytest.mark.slow
def test_cells_are_what_each_prompt_alone_gives(place, tmp_path, capsys):
    assert run(place, tmp_path) == 0
    part = part_of(tmp_path)
    assert part["tasks"] == [f"superglue:{task}" for task in TASKS] and part["metric"] == "accuracy_by_likelihood"
    assert part["prompts"] == ["boolq-0", "boolq-1", "rte-0", "rte-1", "wic-0", "wic-1"]
    assert part["own"] == [2, 2, 0, 0, 1, 1] and part["num_rows"] == dict.fromkeys(part["tasks"], 8)
    base, tokenizer = load_base_model(str(place / "base"), device="cpu")
    for column, name in enumerate(TASKS):
        task = load_task(name, data_dir=str(place / "data"), num_eval=8, **KWARGS[name])
        rows, right = list(task.eval), []
        for number, prompt in enumerate([None, "boolq-1", "wic-0"]):
            model = base if prompt is None else PriorPeftModel.from_pretrained(base, str(place / prompt))
            figures = metrics_by_likelihood(task.metrics, model, tokenizer, rows)
            scores = torch.tensor(score_choices(model, tokenizer, rows, 3)).double()
            right = [row["choices"].index(row["completion"]) for row in rows]
            figures["nll"] = -scores[range(8), right].mean().item()
            figures["choice_nll"] = torch.nn.functional.cross_entropy(scores, torch.tensor(right)).item()
            for metric, value in figures.items():
                of = part["by_metric"][metric]
                row = of["no_prompt"] if prompt is None else of["scores"][part["prompts"].index(prompt)]
                assert row[column] == pytest.approx(value, abs=1e-4), (metric, number)
    printed = capsys.readouterr().out
    assert "| boolq-0" in printed and "of transfers beat no prompt" in printed and "it can't go below 0.167" in printed
    assert set(part["correlations"]) == set(part["similarities"]) == {"frobenius", "cosine", "matched", "neurons"}


@pytest.mark.slow
def test_the_order_of_adapters_does_not_matter(place, tmp_path):
    names = [f"{task}-{seed}" for task in TASKS for seed in (0, 1)]
    assert run(place, tmp_path / "one") == run(place, tmp_path / "other", adapters=names[::-1]) == 0
    assert part_of(tmp_path / "one") == part_of(tmp_path / "other")


def counted(monkeypatch, stop_after=None):
    measured, figures = [], matrix.task_figures

    def measure(model, tokenizer, task, *arguments):
        if len(measured) == stop_after:
            raise KeyboardInterrupt
        measured.append(task.name)
        return figures(model, tokenizer, task, *arguments)

    monkeypatch.setattr(matrix, "task_figures", measure)
    return measured


@pytest.mark.slow
def test_a_stopped_matrix_goes_on(place, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        first = counted(patch, stop_after=10)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path)
    assert not (tmp_path / "analysis.json").exists()
    rest = counted(monkeypatch)
    assert run(place, tmp_path) == 0 and len(first) + len(rest) == 7 * 3
    stopped = part_of(tmp_path)
    assert run(place, tmp_path) == 0 and len(first) + len(rest) == 21  # nothing is measured again
    assert run(place, tmp_path / "whole") == 0
    assert part_of(tmp_path / "whole") == stopped == part_of(tmp_path)
    # Other rows are another measurement, whatever they are called.
    assert run(place, tmp_path, "--split_seed", "1", tasks=["wic"]) == 0 and rest.count("superglue:wic") > 7


def test_what_analyze_wrote_stays(place, tmp_path):
    before = {"format_version": 1, "base_model": "base", "adapters": [{"name": "rte-0"}], "words": {"words": ["a"]}}
    (tmp_path / "analysis.json").write_text(json.dumps(before | {"transfer": None, "left_out": {"transfer": "later", "words": "x"}}))  # fmt: skip
    assert run(place, tmp_path) == 0
    after = json.loads((tmp_path / "analysis.json").read_text())
    assert after.pop("transfer")["tasks"] and after.pop("left_out") == {"words": "x"} and after == before


@pytest.mark.slow
def test_what_transfer_wrote_stays_when_analyze_runs_again(place, tmp_path):
    assert run(place, tmp_path, adapters=["rte-0", "wic-0"]) == 0
    part = part_of(tmp_path)
    assert main(["analyze", str(place / "rte-0"), "--out", str(tmp_path), "--num_draws", "20"]) == 0
    analysis = json.loads((tmp_path / "analysis.json").read_text())
    assert analysis["transfer"] == part and "transfer" not in analysis["left_out"]
    assert analysis["adapters"][0]["tokens"] and 'id="transfer"' in (tmp_path / "report.html").read_text()
    # Nothing is taken over from another model's analysis, or from what is none.
    for other in (json.dumps(analysis | {"base_model": "another"}), "{"):
        (tmp_path / "analysis.json").write_text(other)
        fresh = {"base_model": "base", "left_out": {"transfer": "later"}}
        keep_transfer(tmp_path / "analysis.json", fresh)
        assert fresh == {"base_model": "base", "left_out": {"transfer": "later"}}


def test_one_adapter_has_a_matrix_and_no_correlation(place, tmp_path, capsys):
    assert run(place, tmp_path, adapters=["rte-0"]) == 0
    part = part_of(tmp_path)
    assert len(part["scores"]) == 1 and part["transfers"] == 2 and not part["correlations"]
    assert "A similarity is between two prompts, and there is one" in capsys.readouterr().out


def test_a_prompt_of_another_task_transfers_everywhere(place, tmp_path):
    assert run(place, tmp_path, "--own", "rte", "other", adapters=["rte-0", "wic-0"], tasks=["rte", "boolq"]) == 0
    part = part_of(tmp_path)
    assert part["own"] == [0, None] and part["transfers"] == 3 and part["correlations"] is None
    assert any(note.startswith("No correlation with transfer: own must name a task") for note in part["notes"])


def test_without_own_tasks_there_is_no_share(place, tmp_path, capsys):
    path = place / "rte-0" / "task.json"
    text = path.read_text()
    path.unlink()
    try:
        assert run(place, tmp_path) == 0
    finally:
        path.write_text(text)
    part = part_of(tmp_path)
    assert part["share_beating_no_prompt"] is None and part["own"] is None and len(part["scores"]) == 6
    assert "Which task rte-0 was trained on is not known" in capsys.readouterr().out


def test_generated_answers_are_measured_too(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what is 3 ?", "completion": " 3"}\n' * 4)
    kwargs = json.dumps({"completions": {"train_file": str(tmp_path / "rows.jsonl"), "eval_file": str(tmp_path / "rows.jsonl")}, "rte": KWARGS["rte"] | {"data_dir": str(place / "data")}})  # fmt: skip
    out = tmp_path / "out"
    assert main(["transfer", str(place / "rte-0"), "--tasks", "rte", "completions", "--out", str(out), "--task_kwargs", kwargs]) == 0  # fmt: skip
    part = part_of(out)
    assert part["metric"] == "nll" and not part["higher_is_better"] and list(part["by_metric"]) == ["nll"]


@pytest.mark.parametrize(
    ("flags", "settings", "message"),
    [
        ([], {"tasks": ["rtee"]}, "task must be one of"),
        ([], {"tasks": ["rte", "superglue:rte"]}, "tasks must be different"),
        (["--own", "rte"], {}, "own must name a task for each of the 6 adapters, got 1"),
        (["--own", *["rtee"] * 6], {}, "task must be one of"),
        (["--metric", "f1"], {}, "metric must be one of accuracy_by_likelihood, nll, choice_nll, got 'f1'"),
        (["--task_kwargs", '{"wsc": {}}'], {}, "task_kwargs must be of tasks among .*, got superglue:wsc"),
        (["--batch_sise", "3"], {}, "'--batch_sise' is no flag. Did you mean 'batch_size'"),
        ([], {"adapters": ["base"]}, "model_id must be an adapter"),
    ],
)
def test_bad_input_is_one_line(flags, settings, message, place, tmp_path, capsys):
    assert run(place, tmp_path, *flags, **settings) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("priors-peft transfer: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)


def test_adapters_of_different_bases_are_refused_by_name(place, tmp_path, capsys):
    other, tokenizer = load_base_model(save_base(tmp_path / "other"), device="cpu")
    config = PriorConfig(num_virtual_tokens=3, prior="gaussian")
    get_prior_model(other, config, tokenizer=tokenizer).save_pretrained(str(tmp_path / "stranger"))
    assert run(place, tmp_path / "out", adapters=["rte-0", str(tmp_path / "stranger")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'rte-0'" in line and "'stranger'" in line and "one base model" in line


def test_another_models_analysis_and_damaged_files_are_refused(place, tmp_path, capsys):
    for text, message in (
        ("{", "analysis.json must be JSON"),
        ('{"format_version": 9}', "format_version must be 1"),
        ('{"format_version": 1, "base_model": "gpt2"}', "out must not hold the analysis of another base model"),
    ):
        (tmp_path / "analysis.json").write_text(text)
        assert run(place, tmp_path) == 1 and message in capsys.readouterr().err
        assert (tmp_path / "analysis.json").read_text() == text
    (tmp_path / "analysis.json").unlink()
    (tmp_path / "transfer_cells.json").write_text('{"cells": {}}')
    assert run(place, tmp_path) == 1 and "delete it to measure again" in capsys.readouterr().err


def test_train_says_what_an_adapter_was_trained_on(place, tmp_path):
    kwargs = json.dumps(KWARGS["rte"] | {"data_dir": str(place / "data")})
    flags = ["--task", "superglue:rte", "--task_kwargs", kwargs, "--num_eval", "4", "--num_train", "8"]
    # A text prior without a text takes the task's description.
    flags += ["--prior", "text", "--prior_weight", "0", "--num_virtual_tokens", "3"]
    short = ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")]
    assert main(["train", "--model", str(place / "base"), *flags, *short]) == 0
    noted = read_task(tmp_path / "run")
    assert noted["task"] == "superglue:rte" and (noted["num_train"], noted["num_eval"]) == (8, 4)
    assert str(place) not in (tmp_path / "run" / "task.json").read_text()
    assert read_task(place / "base") is None
