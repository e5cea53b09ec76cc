"""`priors-peft compare` on real runs: figures are the runs' own, and runs that don't belong together are an error."""

import importlib
import json
import shutil
import statistics
from pathlib import Path

import pytest
from conftest import SUPERGLUE_KWARGS, addition_rows, make_model, make_tokenizer, save_base, write_superglue
from datasets import Dataset

from priors_peft import PriorConfig, get_prior_model, load_base_model
from priors_peft.analysis.compare import name_runs
from priors_peft.analysis.sources import read_sources
from priors_peft.cli import main
from priors_peft.commands.compare import ComparisonArguments, activations, load_rows, read_run
from priors_peft.hub.facts import TrainingFacts


pytestmark = pytest.mark.slow
RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Two tasks, two priors, two seeds, on the tiny model; `tasks.json` says where the data lies."""
    folder = tmp_path_factory.mktemp("study")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(60)))
    rte = {"data_dir": write_superglue(folder / "superglue")} | SUPERGLUE_KWARGS["superglue:rte"]
    (folder / "tasks.json").write_text(json.dumps({"completions": {"train_file": str(rows)}, "rte": rte}))
    (folder / "sweep.yaml").write_text(
        json.dumps(
            {
                "model": save_base(folder / "base"),
                "output_dir": str(folder / "out"),
                "num_virtual_tokens": 4,
                "max_steps": 3,
                "num_eval": 12,
                "logging_steps": 1,
                "eval_on_start": True,
                "prior_weight": 0,
                "prediction_loss_only": True,
                "use_cpu": True,
                "disable_tqdm": True,
                "grid": {
                    "task": {
                        "completions": {"train_file": str(rows)},
                        "rte": {
                            "task": "rte",
                            "data_dir": rte["data_dir"],
                            "task_kwargs": SUPERGLUE_KWARGS["superglue:rte"],
                        },
                    },
                    "prior": ["gaussian", "structured"],
                    "seed": [0, 1],
                },
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES))
        importlib.import_module("sweep").main([str(folder / "sweep.yaml")])
    return folder


def compare(study: Path, out: Path, *flags: str, names: str = "*") -> int:
    runs = [str(path) for path in sorted((study / "out" / "runs").glob(names))]
    rows = (study / "tasks.json").read_text()
    return main(["compare", *runs, "--out", str(out), "--tasks", rows, "--num_permutations", "49", *flags])


def test_figures_are_those_of_the_runs(study, tmp_path, capsys):
    assert compare(study, tmp_path) == 0
    found = json.loads((tmp_path / "compare.json").read_text())
    lines = [json.loads(line) for line in (study / "out" / "results.jsonl").read_text().splitlines()]
    losses = {record["run"]: record["results"]["loss"] for record in lines}
    rows = {(row["task"], row["prior"]): row for row in found["table"]}
    assert set(rows) == {
        (task, prior) for task in ("completions", "superglue:rte") for prior in ("gaussian", "structured")
    }
    own = [losses[f"rte-structured-{seed}"] for seed in (0, 1)]
    base = [losses[f"rte-gaussian-{seed}"] for seed in (0, 1)]
    row = rows["superglue:rte", "structured"]
    assert row["results"]["nll"]["mean"] == pytest.approx(statistics.fmean(own))
    assert row["results"]["nll"]["std"] == pytest.approx(statistics.stdev(own))
    differences = [a - b for a, b in zip(own, base, strict=True)]
    assert row["difference"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert row["difference"]["n"] == 2
    place = found["place"]["soft"]
    assert place["runs"] == 8 and 0 < place["mmd"]["p_value"] <= 1
    assert {one["condition"] for one in found["clusters"]} == {
        "no prompt",
        "soft, gaussian, completions",
        "soft, gaussian, superglue:rte",
    }
    assert all(one["counts"] == {"completions": 12, "superglue:rte": 12} for one in found["clusters"])
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "compare.md").read_text().strip())
    assert str(study) not in (tmp_path / "compare.json").read_text() + (tmp_path / "compare.md").read_text()
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"learning_curves", "prompts", "activations_pca", "activations_tsne"}


def test_no_prompt_is_what_evaluate_measures(study, tmp_path, capsys):
    own = json.dumps({"completions": {"train_file": str(study / "rows.jsonl")}})
    assert compare(study, tmp_path, "--tasks", own, names="completions-*") == 0
    adapter = tmp_path / "adapter"
    shutil.copytree(study / "out" / "runs" / "completions-gaussian-0", adapter)
    rows = [
        "--train_file",
        str(study / "rows.jsonl"),
        "--num_eval",
        "12",
        "--output_file",
        str(tmp_path / "figures.json"),
    ]
    assert "Activations are not compared" in capsys.readouterr().out
    assert not list(tmp_path.glob("activations*"))
    assert main(["evaluate", str(adapter), *rows]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["no_prompt"]["completions"] == pytest.approx(figures["no prompt"]["nll"], rel=1e-4)
    gain = found["no_prompt"]["completions"] - figures[str(adapter)]["nll"]
    arm = next(arm for arm in found["regions"]["arms"] if arm["prior"] == "gaussian")
    seeds = [run["results"]["nll"] for run in found["runs"] if run["prior"] == "gaussian"]
    assert gain == pytest.approx(found["no_prompt"]["completions"] - seeds[0], rel=1e-4)
    assert arm["gain"]["mean"] == pytest.approx(found["no_prompt"]["completions"] - statistics.fmean(seeds))


def test_a_text_prior_is_one_arm_whatever_its_tasks_description(study, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(study / "out" / "runs" / "rte-gaussian-0", adapter)
    described, description = json.loads((adapter / "prior_config.json").read_text()), "Does the first follow?"
    for text, left in ((description, None), ("my own", {"text": "my own"})):
        described["config"]["prior_kwargs"] = {"text": text}
        (adapter / "prior_config.json").write_text(json.dumps(described))
        facts = json.loads((adapter / "task.json").read_text()) | {"description": description}
        (adapter / "task.json").write_text(json.dumps(facts))
        (source,) = read_sources([str(adapter)])
        assert read_run(source).settings.get("prior_kwargs") == left


def test_other_settings_of_an_algorithm_are_other_arms(study, tmp_path):
    for name, settings in (("plain", {}), ("wide", {"initial_scale": 0.5})):
        shutil.copytree(study / "out" / "runs" / "rte-gaussian-0", tmp_path / name)
        described = json.loads((tmp_path / name / "prior_config.json").read_text())
        described["config"] |= {"inference": "variational", "inference_kwargs": settings, "prior_weight": 0.1}
        (tmp_path / name / "prior_config.json").write_text(json.dumps(described))
    trained = json.loads((tmp_path / "wide" / "training.json").read_text())
    (tmp_path / "wide" / "training.json").write_text(json.dumps(trained | {"posterior_draws": 2}))
    runs = [read_run(source) for source in read_sources([str(tmp_path / name) for name in ("plain", "wide")])]
    name_runs(runs)
    assert [run.prior for run in runs] == ["gaussian", "gaussian initial_scale=0.5 posterior_draws=2"]


def test_priors_of_other_data_are_other_arms_and_the_same_data_anywhere_is_one(tmp_path):
    base, tokenizer = make_model(), make_tokenizer()

    def settings(name, reference, recipe=None, **kwargs):
        config = PriorConfig(num_virtual_tokens=4, prior="gaussian", reference=reference, reference_kwargs=kwargs)
        get_prior_model(base, config, tokenizer=tokenizer).save_pretrained(str(tmp_path / name))
        TrainingFacts(results={"default": {"loss": 1.0}}, recipe=recipe or {}).save(tmp_path / name)
        (tmp_path / name / "task.json").write_text('{"task": "completions"}')
        (source,) = read_sources([str(tmp_path / name)])
        return read_run(source).settings

    rows = addition_rows(40)
    one, again, other, fewer = (
        settings(name, "activations", **kwargs)
        for name, kwargs in {
            "one": {"data": rows},
            "again": {"data": rows},
            "other": {"data": addition_rows(40, start=500)},
            "fewer": {"data": rows, "num_tokens": 50},
        }.items()
    )
    assert one == again and len({of["fitted_on"] for of in (one, other, fewer)}) == 3
    assert "fitted_on" not in settings("vocabulary", "vocabulary")
    own = [settings(f"own{start}", "activations", {"reference": "activations"}, data=rows[start:]) for start in (0, 9)]
    assert own[0] == own[1] != one


def test_no_prompt_is_measured_on_rows_that_are_cut_as_the_runs_were(study):
    (source,) = read_sources([str(study / "out" / "runs" / "completions-gaussian-0")])
    base, tokenizer = load_base_model(str(study / "base"))
    args = ComparisonArguments(tasks=(study / "tasks.json").read_text())
    lengths = []
    for max_length in (None, 5):
        run = read_run(source)
        run.task, run.data["max_length"] = "completions", max_length
        tokens = load_rows([run], [source], args, base, tokenizer)
        lengths.append(max(map(len, tokens["completions"]["input_ids"])))
    assert lengths[0] > 5 == lengths[1]


def test_plain_text_has_no_activations_to_compare():
    rows = {"input_ids": [[1, 5, 6]] * 6, "attention_mask": [[1] * 3] * 6}
    labels = {"text": [[-100, 5, 6]] * 6, "questions": [[-100, -100, 6]] * 6}
    tokens = {name: Dataset.from_dict(rows | {"labels": of_task}) for name, of_task in labels.items()}
    assert activations(None, tokens, [], ComparisonArguments()) == {}


def test_other_rows_than_the_runs_own_are_refused(study, tmp_path, capsys):
    assert (
        compare(
            study,
            tmp_path,
            "--tasks",
            json.dumps({"completions": {"train_file": str(study / "rows.jsonl"), "num_eval": 9}}),
            names="completions-*",
        )
        == 1
    )
    assert "must have the 12 evaluation rows of the runs, got 9 of 'completions'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, names, message",
    [
        (
            ["--baseline", "gausian"],
            "*",
            "baseline (--baseline) must be one of gaussian, structured, got 'gausian'. Did you mean 'gaussian'?",
        ),
        (["--tasks", "{}"], "completions-*", """pass --tasks '{"completions": {"train_file": ...}}'"""),
        ([], "rte-gaussian-0", "runs must be at least 2 to be compared, got 1"),
        ([], "none-*", "RUN... must be given, got []"),
        (["--num_rows", "3"], "*", "num_rows must be an integer >= 10, got 3"),
        (["--tasks", '{"maths": {}}'], "*", "maths"),
    ],
)
def test_bad_input_is_one_line(flags, names, message, study, tmp_path, capsys):
    assert compare(study, tmp_path / "out", *flags, names=names) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("priors-peft compare: ") and message in line
    assert not (tmp_path / "out" / "compare.json").exists()


def test_a_run_without_results_or_over_another_base_is_refused(study, tmp_path, capsys):
    runs = [str(path) for path in sorted((study / "out" / "runs").glob("rte-*"))]
    bare = tmp_path / "bare"
    shutil.copytree(runs[0], bare)
    facts = json.loads((bare / "training.json").read_text())
    (bare / "training.json").write_text(json.dumps(facts | {"results": {}}))
    assert main(["compare", runs[1], str(bare), "--out", str(tmp_path / "out")]) == 1
    assert "got 'bare' without training.json with results: train it with that" in capsys.readouterr().err
    (bare / "task.json").unlink()  # as one trained in Python
    assert main(["compare", runs[1], str(bare), "--out", str(tmp_path / "out")]) == 1
    assert (
        "got 'bare' without a task in task.json: train it with that command and num_eval > 0"
        in capsys.readouterr().err
    )
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    described = json.loads((other / "prior_config.json").read_text())
    described["config"]["base_model_name_or_path"] = "some/model"
    (other / "prior_config.json").write_text(json.dumps(described))
    assert main(["compare", runs[1], str(other), "--out", str(tmp_path / "out")]) == 1
    assert "adapters must have one base model" in capsys.readouterr().err
