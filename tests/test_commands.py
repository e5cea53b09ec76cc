"""The commands do the whole job on a user's own data, and bad input is one clear line."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SUPERGLUE_KWARGS, addition_rows, make_model, make_tokenizer, write_superglue

from priors_peft.cli import COMMANDS, main
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.train import TrainingArguments


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    return str(path)


def train(base, rows, folder, *flags) -> int:
    short = ["--max_steps", "3", "--use_cpu", "--num_virtual_tokens", "4", "--disable_tqdm", "true"]
    return main(["train", "--model", base, "--train_file", rows, "--output_dir", str(folder), *short, *flags])


@pytest.mark.slow
def test_train_then_evaluate_on_a_users_file(base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "out", "--prior", "gaussian", "--num_eval", "8") == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "prior_config.json", "prior.safetensors"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    trained = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    figures = tmp_path / "figures.json"
    evaluated = ["evaluate", str(tmp_path / "out"), "--train_file", rows, "--num_eval", "8"]
    # Without --model: the base model is found from the adapter.
    assert main([*evaluated, "--output_file", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["averaged over 8 draws"]["nll"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    assert found["no prompt"]["nll"] != found[str(tmp_path / "out")]["nll"]
    assert "NLL (nats/token)" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_knows_the_task_and_the_rows_held_out_in_training(base, tmp_path):
    (tmp_path / "prompts.csv").write_text("act,prompt\n" + "".join(f"{n},what is {n}\n" for n in range(30)))
    data = ["--data_dir", str(tmp_path)]
    flags = ["--model", base, "--task", "prompts", *data, "--num_eval", "5", "--split_seed", "3", "--max_steps", "1"]
    template = ["--task_kwargs", '{"template": "Question: {act} plus"}', "--use_cpu", "--disable_tqdm", "true"]
    assert main(["train", *flags, *template, "--num_virtual_tokens", "4", "--output_dir", str(tmp_path / "out")]) == 0
    trained = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert main(["evaluate", str(tmp_path / "out"), *data]) == 0
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["num_rows"] == 5
    assert kept["figures"]["averaged over 8 draws"]["nll"] == pytest.approx(trained["eval_loss"], rel=1e-4)


@pytest.mark.slow
def test_deep_training_resumes(base, rows, tmp_path, capsys):
    flags = ("--tuning", "deep", "--layers", "0,-1", "--save_steps", "1", "--prior_kwargs", '{"shrinkage": 0.5}')
    assert train(base, rows, tmp_path / "out", *flags) == 0
    described = json.loads((tmp_path / "out" / "prior_config.json").read_text())["config"]
    assert described["layers"] == [0, -1] and described["prior_kwargs"] == {"shrinkage": 0.5}
    assert train(base, rows, tmp_path / "out", *flags, "--max_steps", "5", "--resume") == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5
    other = str(tmp_path / "out" / "checkpoint-9")
    assert train(base, rows, tmp_path / "out", *flags, "--resume_from_checkpoint", other) == 1
    assert f"resume_from_checkpoint must be a whole checkpoint, got {other!r}" in capsys.readouterr().err


def test_train_without_evaluation_rows(base, rows, tmp_path):
    assert train(base, rows, tmp_path / "out", "--num_eval", "0") == 0
    assert not (tmp_path / "out" / "eval_results.json").exists()


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: some/model\nprior: gaussian\nlearning_rate: 1e-2\nprior_kwargs: {scale: 0.02}\n")
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    model, _, prompt, args = parse(dataclasses, [str(recipe), "--prior", "structured"], "priors-peft train")
    assert (model.model, prompt.prior, args.learning_rate) == ("some/model", "structured", 0.01)
    assert prompt.prior_kwargs == {"scale": 0.02}


def test_a_recipes_values_mean_what_they_mean_after_a_flag(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "save_strategy: no\nlayers: [0, -1]\nmax_length: null\nreport_to: [none]\nmax_grad_norm: 1e3\nbf16: no\n"
    )
    dataclasses = (PromptArguments, TrainingArguments)
    prompt, args = parse(dataclasses, [str(recipe)], "priors-peft train")
    assert (args.save_strategy, args.max_length, args.max_grad_norm, args.bf16) == ("no", None, 1000.0, False)
    flags = ["--save_strategy", "no", "--layers", "0,-1", "--report_to", "none", "--max_grad_norm", "1e3"]
    as_flags = parse(dataclasses, flags, "priors-peft train")
    assert prompt == as_flags[0] and prompt.layers == [0, -1]
    assert (args.report_to, args.save_strategy) == (as_flags[1].report_to, as_flags[1].save_strategy)


@pytest.mark.parametrize(
    "recipe",
    [path for path in sorted(Path(__file__).parents[1].glob("recipes/**/*.yaml")) if "grid:" not in path.read_text()],
    ids=lambda path: path.stem,
)
def test_recipes_parse(recipe):
    parse((ModelArguments, TaskArguments, PromptArguments, TrainingArguments), [str(recipe)], "priors-peft train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m\n# note\nlearning_rat: 1\n", "line 3: 'learning_rat' is no flag. Did you mean 'learning_rate'?"),
        ("- model\n", "must map flags to values, as in `task: squad`, got list"),
        ("# nothing\n", "must map flags to values, as in `task: squad`, got an empty file"),
        ("model: [", "recipe.yaml must be YAML, got: while parsing a flow node expected the node content"),
        ("model: m\nseed: 1\nmodel: n\n", "line 3: 'model' must be given once, got it in line 1 too"),
        ("task_kwargs:\n  a: 1\n  a: 2\n", "line 3: 'a' must be given once, got it in line 2 too"),
        (
            "task: math\nlearning_rate: high\n",
            "line 2: argument --learning_rate/--learning-rate: invalid float value: 'high'",
        ),
        (
            "num_virtual_tokens: 2.5\n",
            "line 1: argument --num_virtual_tokens/--num-virtual-tokens: invalid int value: '2.5'",
        ),
        ("bf16: maybe\n", "line 1: argument --bf16: Truthy value expected: got maybe"),
        ("save_strategy: noo\n", "line 1: argument --save_strategy/--save-strategy: invalid choice: 'noo'"),
        ("num_train: [1]\n", "line 1: num_train must be a single value, got [1]"),
        ("model: {m: 1}\n", "line 1: model must be a single value, got {'m': 1}"),
        ("max_steps:\n", "line 1: max_steps must be a single value, got None"),
    ],
)
def test_bad_recipes_are_refused(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["train", str(recipe)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", ""], "model must be given"),
        (["--prior_wieght", "0"], "'--prior_wieght' is no flag. Did you mean 'prior_weight'?"),
        (["--max_step", "2"], "'--max_step' is no flag. Did you mean 'max_steps'?"),
        (
            ["--prior", "structure"],
            "prior must be one of empirical, exclusion, gaussian, interpolation, structured, text, "
            "got 'structure'. Did you mean 'structured'?",
        ),
        (["--tuning", "Sof"], "tuning must be one of soft, deep, got 'Sof'. Did you mean 'soft'?"),
        (["--reference", "vocab"], "got 'vocab'. Did you mean 'vocabulary'?"),
        (["--reference_kwargs", '{"dat": 1}'], "must be one of data, got 'dat'. Did you mean 'data'?"),
        (["--reference_kwargs", '{"tasks": ["math", "squad"]}'], "must name 1 in tasks for prior='structured'"),
        (["--task_kwargs", '{"promt_column": "p"}'], "got promt_column='p'. Did you mean 'prompt_column'"),
        (["recipe.yaml"], "a recipe must stand before the flags, got 'recipe.yaml' after them"),
        (["--learning_rate", "high"], "argument --learning_rate/--learning-rate: invalid float value: 'high'"),
        (["--num_virtual_tokens", "0"], "num_virtual_tokens must be an integer >= 1, got 0"),
        (["--layers", "first"], "layers must be all or numbers like 0,-3,-2,-1, got 'first'"),
        (["--prior_kwargs", "{"], "prior_kwargs must be a JSON object"),
        (["--dtype", "int4"], "dtype must be float32, bfloat16 or float16, got 'int4'"),
        (
            ["--task", "maths"],
            "task must be one of completions, math, prompts, squad, superglue, got 'maths'. Did you mean 'math'?",
        ),
        (["--train_file", "nowhere.jsonl"], "train_file must be an existing file, got 'nowhere.jsonl'"),
    ],
)
def test_bad_flags_are_one_line(flags, message, base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "out", *flags) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("priors-peft train: ")


@pytest.fixture(scope="module")
def adapter(base, rows, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "sums"
    assert train(base, rows, folder, "--prior", "gaussian") == 0
    return str(folder)


QUICK = ["--num_draws", "20", "--k", "3"]


@pytest.mark.slow
def test_analyze_writes_figures_that_differ_by_their_date_alone(adapter, base, rows, tmp_path, capsys):
    task = ["--train_file", rows, "--num_eval", "8"]
    texts = []
    for out in ("one", "two"):
        assert main(["analyze", adapter, "--out", str(tmp_path / out), *QUICK, *task]) == 0
        text = (tmp_path / out / "analysis.json").read_text()
        analysis = json.loads(text)
        texts.append(text.replace(analysis["created"], ""))
    assert texts[0] == texts[1]
    assert not any(str(Path(place).parent) in texts[0] for place in (adapter, base, rows, tmp_path / "one"))
    assert analysis["command"].startswith("priors-peft analyze sums --train_file rows.jsonl --num_eval 8 --k 3")
    assert analysis["base_model"] == "base"
    (found,) = analysis["adapters"]
    assert (found["task"], found["steps"], found["faithfulness"]["rows"]) == ("completions", 3, 8)
    assert {"report.html", "tokens.png", "geometry.png"} <= {path.name for path in (tmp_path / "two").iterdir()}
    printed = capsys.readouterr().out
    for expected in ("nearest tokens", "percentile of prior", "words: it needs two adapters", "report.html"):
        assert expected in printed


@pytest.mark.slow
def test_analyze_takes_several_adapters_and_contrasts_tasks(adapter, base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "deep", "--tuning", "deep", "--layers", "0,-1") == 0
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"is {n} ?", "completion": " plus"}) + "\n" for n in range(40)))
    contrast = json.dumps({"completions": {"train_file": str(other)}})
    out = ["--out", str(tmp_path / "out"), *QUICK]
    twice = ["analyze", adapter, str(tmp_path / "deep"), *out, "--train_file", rows, "--contrast", contrast]
    assert main(twice) == 1
    assert "contrast must name other tasks than task, got 'completions' twice" in capsys.readouterr().err
    assert main(["analyze", adapter, str(tmp_path / "deep"), *out]) == 0
    assert "layers 2 have no vocabulary" in capsys.readouterr().out
    assert [one["name"] for one in json.loads((tmp_path / "out" / "analysis.json").read_text())["adapters"]] == [
        "deep",
        "sums",
    ]


@pytest.mark.slow
def test_activations_of_contrasted_tasks_are_compared(adapter, rows, tmp_path):
    data = write_superglue(tmp_path / "data")
    contrast = json.dumps({"wic": {"data_dir": data, **SUPERGLUE_KWARGS["superglue:wic"]}})
    flags = [
        "--out",
        str(tmp_path / "out"),
        *QUICK,
        "--train_file",
        rows,
        "--num_eval",
        "8",
        "--activation_layers",
        "1,-1",
    ]
    assert main(["analyze", adapter, *flags, "--contrast", contrast]) == 0
    text = (tmp_path / "out" / "analysis.json").read_text()
    analysis = json.loads(text)
    found = analysis["activations"]["layers"]
    assert [(one["layer"], one["adapter"]) for one in found] == [(1, None), (1, "sums"), (3, None), (3, "sums")]
    assert all(set(one["counts"]) == {"completions", "superglue:wic"} for one in found)
    assert "--contrast" in analysis["command"] and str(tmp_path) not in text
    assert (tmp_path / "out" / "activations.png").exists()


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_analysed_by_its_id(adapter, base, hub, tmp_path):
    for name, folder in (("base", base), ("adapter", adapter)):
        hub.create(f"user/{name}")
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
        named = {path: content.replace(base.encode(), b"user/base") for path, content in files.items() if path.endswith("config.json")}  # fmt: skip
        hub.commit(f"user/{name}", "main", "all", files | named)
    assert main(["analyze", "user/adapter", "--out", str(tmp_path / "hub"), *QUICK]) == 0
    assert main(["analyze", adapter, "--out", str(tmp_path / "local"), *QUICK]) == 0
    found, local = (json.loads((tmp_path / out / "analysis.json").read_text()) for out in ("hub", "local"))
    assert found["base_model"] == "user/base" and found["command"] == "priors-peft analyze user/adapter --k 3 --num_draws 20 --out DIR"  # fmt: skip
    (one,), (other,) = found["adapters"], local["adapters"]
    assert (one["name"], one["source"], one["task"], one["steps"]) == (
        "user/adapter",
        "user/adapter",
        "completions",
        3,
    )
    # Its snapshots, its start and its prior came with it.
    assert one["tokens"] == other["tokens"] and one["geometry"] == other["geometry"]
    assert "user/adapter" in (tmp_path / "hub" / "report.html").read_text()


@pytest.mark.parametrize("command", ["evaluate", "analyze", "transfer"])
def test_batches_of_no_rows_are_refused_before_anything_is_read(command, capsys):
    assert main([command, "nowhere", "--batch_size", "0"]) == 1
    assert "batch_size must be an integer >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["py3langid", "matplotlib", "plotly", "jinja2"])
def test_a_package_that_is_not_there_is_named_before_anything_is_computed(package, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    assert main(["analyze", "nowhere", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip() == (
        f"priors-peft analyze: priors-peft analyze needs {package}, which is not installed. "
        'Run `pip install "priors_peft[analysis]"`'
    )
    assert not (tmp_path / "out").exists()


def test_figures_are_there_when_pictures_fail(adapter, tmp_path, capsys, monkeypatch):
    def fail(*given):
        raise OSError("no room for pictures")

    monkeypatch.setattr("priors_peft.analysis.pictures.save_pictures", fail)
    assert main(["analyze", adapter, "--out", str(tmp_path / "out"), *QUICK]) == 1
    assert "no room for pictures" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["adapters"][0]["name"] == "sums"


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "out must be given"),
        (["--out", "{out}", "--metric", "manhattan"], "metric must be one of cosine, l2, dot, got 'manhattan'"),
        (["--out", "{out}", "--train_file", "{empty}"], "must hold at least one row, got an empty file"),
        (["--out", "{out}", "--train_file", "{rows}", "--num_eval", "0"], "task must have evaluation rows, got"),
        (["--out", "{out}", "--contrast", '{"math": {}}'], "task must be given for contrast"),
        (["--out", "{out}", "--contrast", '{"maths": {}}'], "maths"),
        (["--out", "{out}", "--activation_layers", "last"], "activation_layers must be numbers like 10,-1"),
        (["--out", "{rows}"], "out must be writable"),
        (["--out", "{out}", "--num_draws", "3"], "num_draws must be an integer >= 19, got 3"),
    ],
)
def test_bad_input_of_analyze_is_one_line(flags, message, adapter, rows, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    places = {"out": tmp_path / "out", "rows": rows, "empty": tmp_path / "empty.jsonl"}
    for name, place in places.items():
        flags = [flag.replace(f"{{{name}}}", str(place)) for flag in flags]
    assert main(["analyze", adapter, *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("priors-peft analyze: ") and message in error
    assert not (tmp_path / "out" / "analysis.json").exists()


def test_analyze_wants_adapters(tmp_path, capsys):
    assert main(["analyze", "--out", str(tmp_path)]) == 1
    assert "ADAPTER... must be given, got []" in capsys.readouterr().err
    assert main(["analyze", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "which has no adapter_config.json" in capsys.readouterr().err


def test_doctor_says_what_a_model_supports(base, capsys):
    assert main(["doctor", "--model", base]) == 0
    printed = capsys.readouterr().out
    for expected in ("rows as one sequence without padding", "32 (3 layers)", "128 tokens", "96 rows"):
        assert expected in printed


def test_help_needs_nothing_heavy():
    code = "import sys; from priors_peft.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS) and done.stdout.endswith("False\n")
    assert main(["tune"]) == 2
    again = subprocess.run([sys.executable, "-m", "priors_peft", "--help"], capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout.removesuffix("False\n")


def test_of_several_processes_the_first_does_what_is_not_training(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["evaluate", "nowhere"]) == 0 and capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert main(["evaluate", "nowhere"]) == 1


@pytest.mark.slow
def test_accelerate_launches_the_recipe_script_and_the_commands(base, rows, tmp_path):
    script = Path(__file__).parents[1] / "recipes" / "train.py"
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch = [*accelerate, str(script)]
    flags = ["--model", base, "--train_file", rows, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    launch = [*accelerate, "-m", "priors_peft", "evaluate", str(tmp_path / "out"), "--train_file", rows]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "NLL (nats/token)" in done.stdout, done.stderr
