"""What stands in code blocks of the documentation is run: here, or by the test that RUN_ELSEWHERE names."""

import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import SUPERGLUE_KWARGS, make_model, make_tokenizer, save_base, write_superglue

import priors_peft
from priors_peft.cli import COMMANDS, main
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.train import TrainingArguments


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("recipes/**/*.md")]
)
RUN_ELSEWHERE = {
    "README.md": "tests/test_readme.py",
    "docs/hub.md": "tests/hub/test_push.py",
    "docs/exports.md": "tests/hub/test_export.py",
    "docs/posterior.md": "tests/inference/test_posterior_page.py",
}
RUN_HERE = {"docs/priors.md", "docs/tasks.md"}
SHORT = ["--use_cpu", "--max_steps", "2", "--num_virtual_tokens", "4", "--disable_tqdm", "true"]


def blocks(page: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def lines(page: str) -> list[list[str]]:
    """Words of each command, continued lines joined."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def has_launcher(words: list[str]) -> bool:
    """Whether a line starts several processes, which tests/distributed does, or needs GPUs or Slurm."""
    return words[0] in ("export", "srun") or "--config_file" in words


COMMAND_LINES = [(page, words) for page in PAGES for words in lines(page)]


def test_every_page_with_python_has_a_test_that_runs_it():
    pages = {page for page in PAGES if blocks(page, "python")}
    assert pages == RUN_HERE | RUN_ELSEWHERE.keys()
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_shell_blocks_are_shell(page):
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)


def started(words: list[str]) -> list[str]:
    """What a line's launchers start, the launchers' own flags and files read by themselves."""
    if words[0] == "srun":
        slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "HEAD": "10.0.0.1"}
        line = ["bash", "-c", words[-1].replace("accelerate", "printf '%s\\n' accelerate", 1)]
        words = subprocess.run(line, env=os.environ | slurm, capture_output=True, text=True, check=True).stdout.split()
    if words[:2] == ["accelerate", "launch"]:
        given = launch_command_parser().parse_args(words[2:])
        if given.config_file:
            load_config_from_file(given.config_file)
        words = ["python", given.training_script, *given.training_script_args]
    return ["priors-peft", "train", *words[2:]] if words[1] == "recipes/train.py" else words


class Parsed(Exception):
    """The command line was read."""


@pytest.mark.parametrize("page, words", COMMAND_LINES, ids=[" ".join(words)[:60] for _, words in COMMAND_LINES])
def test_commands_name_flags_files_and_targets_that_are_there(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in words:
        if re.fullmatch(r"(accelerate_configs|recipes|benchmarks|tests|docs)/\S+\.\w+", word):
            assert Path(word).is_file(), word
    words = started(words)
    if "recipes/sweep.py" in words:
        monkeypatch.syspath_prepend(str(ROOT / "recipes"))
        path, *flags = words[words.index("recipes/sweep.py") + 1 :]
        first, *_, last = importlib.import_module("sweep").read_sweep(path, [*flags, "--use_cpu"])
        assert first.parsed() and last.parsed()  # test_sweep parses all runs of a file
    if words[0] == "priors-peft":
        assert words[1] in COMMANDS
        module = importlib.import_module(f"priors_peft.commands.{words[1]}")

        def read(*given):
            parse(*given)
            raise Parsed

        monkeypatch.setattr(module, "parse", read)
        with pytest.raises(Parsed):
            module.main([*words[2:], "--use_cpu"] if words[1] == "train" else words[2:])


@pytest.mark.slow
def test_the_tasks_pages_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data = save_base(Path("base")), write_superglue(Path("DATA/superglue"))
    kwargs = ["--data_dir", data, "--task_kwargs", json.dumps(SUPERGLUE_KWARGS["superglue:rte"])]
    train, evaluate = (words[1:] for words in lines("docs/tasks.md"))
    train[train.index("bundled:smollm2-135m")] = base
    assert main([*train, *kwargs, *SHORT]) == 0
    assert main([*evaluate, *kwargs]) == 0
    scope = dict(vars(importlib.import_module("priors_peft.tasks")))
    for block in blocks("docs/tasks.md", "python"):
        exec(block, scope)
    assert scope["task"].name == "superglue:rte" and len(scope["task"].eval) == 16
    (recipe,) = blocks("docs/tasks.md", "yaml")
    Path("recipe.yaml").write_text(recipe)
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    task = parse(dataclasses, ["recipe.yaml", "--use_cpu", "--output_dir", "out"], "priors-peft train")[1]
    assert task.task_kwargs == yaml.safe_load(recipe)["task_kwargs"]


def test_the_priors_pages_python_runs():
    scope = dict(vars(priors_peft)) | {"base": make_model(), "tokenizer": make_tokenizer()}
    scope |= {name: getattr(priors_peft, name) for name in ("PriorConfig", "get_prior_model")}
    for block in blocks("docs/priors.md", "python"):
        exec(block, scope)
    assert scope["model"].peft_config["default"].prior == "text"
