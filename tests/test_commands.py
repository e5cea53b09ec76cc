"""The commands do the whole job on a user's own data, and bad input is one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import addition_rows, make_model, make_tokenizer

from priors_peft.cli import COMMANDS, main
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.train import TrainingArguments


@pytest.fixture
def base(tmp_path) -> str:
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    return str(path)


def train(base, rows, folder, *flags) -> int:
    short = ["--max_steps", "3", "--use_cpu", "--num_virtual_tokens", "4", "--disable_tqdm", "true"]
    return main(["train", "--model", base, "--train_file", rows, "--output_dir", str(folder), *short, *flags])


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
    assert found[str(tmp_path / "out")]["nll"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    assert found["no prompt"]["nll"] != found[str(tmp_path / "out")]["nll"]
    assert "NLL (nats/token)" in capsys.readouterr().out


def test_deep_training_resumes(base, rows, tmp_path):
    flags = ("--tuning", "deep", "--layers", "0,-1", "--save_steps", "1", "--prior_kwargs", '{"shrinkage": 0.5}')
    assert train(base, rows, tmp_path / "out", *flags) == 0
    described = json.loads((tmp_path / "out" / "prior_config.json").read_text())["config"]
    assert described["layers"] == [0, -1] and described["prior_kwargs"] == {"shrinkage": 0.5}
    assert train(base, rows, tmp_path / "out", *flags, "--max_steps", "5", "--resume") == 0
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5


def test_flags_win_over_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: some/model\nprior: gaussian\nlearning_rate: 1e-2\nprior_kwargs: {scale: 0.02}\n")
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    model, _, prompt, args = parse(dataclasses, [str(recipe), "--prior", "structured"], "priors-peft train")
    assert (model.model, prompt.prior, args.learning_rate) == ("some/model", "structured", 0.01)
    assert prompt.prior_kwargs == {"scale": 0.02}


@pytest.mark.parametrize(
    "recipe", sorted(Path(__file__).parents[1].glob("recipes/**/*.yaml")), ids=lambda path: path.stem
)
def test_recipes_parse(recipe):
    parse((ModelArguments, TaskArguments, PromptArguments, TrainingArguments), [str(recipe)], "priors-peft train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m\n# note\nlearning_rat: 1\n", "line 3: 'learning_rat' is no flag; did you mean 'learning_rate'?"),
        ("- model\n", "must map flags to values, got list"),
        ("model: [", "must be YAML"),
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
        (["--prior_wieght", "0"], "'--prior_wieght' is no flag; did you mean 'prior_weight'?"),
        (["--max_step", "2"], "'--max_step' is no flag; did you mean 'max_steps'?"),
        (["--prior", "structure"], "prior must be one of"),
        (["--num_virtual_tokens", "0"], "num_virtual_tokens must be >= 1, got 0"),
        (["--layers", "first"], "layers must be all or numbers like 0,-3,-2,-1, got 'first'"),
        (["--prior_kwargs", "{"], "prior_kwargs must be a JSON object"),
        (["--dtype", "int4"], "dtype must be float32, bfloat16 or float16, got 'int4'"),
        (["--task", "maths"], "maths"),
        (["--train_file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_flags_are_one_line(flags, message, base, rows, tmp_path, capsys):
    assert train(base, rows, tmp_path / "out", *flags) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("priors-peft train: ")


def test_doctor_says_what_a_model_supports(base, capsys):
    assert main(["doctor", "--model", base]) == 0
    printed = capsys.readouterr().out
    for expected in ("cache (prompt computed once a batch)", "32 (3 layers)", "128 tokens", "96 rows"):
        assert expected in printed


def test_help_needs_nothing_heavy():
    code = "import sys; from priors_peft.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS) and done.stdout.endswith("False\n")
    assert main(["tune"]) == 2


@pytest.mark.slow
def test_accelerate_launches_the_recipe_script(base, rows, tmp_path):
    script = Path(__file__).parents[1] / "recipes" / "train.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(script)]
    flags = ["--model", base, "--train_file", rows, "--output_dir", str(tmp_path / "out"), "--max_steps", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, *flags], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
