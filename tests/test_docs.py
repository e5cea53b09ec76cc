"""What stands in code blocks of the documentation is run: here, or by the test that RUN_ELSEWHERE names."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import SUPERGLUE_KWARGS, addition_rows, make_model, make_tokenizer, save_base, write_superglue

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


COMMAND_LINES = [(page, words) for page in PAGES for words in lines(page)]


def test_every_page_with_python_has_a_test_that_runs_it():
    pages = {page for page in PAGES if blocks(page, "python")}
    assert pages == RUN_HERE | RUN_ELSEWHERE.keys()
    for page, test in RUN_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text(encoding="utf-8")


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
    if words[:2] == ["accelerate", "launch"] and "recipes/train.py" in words:
        words = ["priors-peft", "train", *words[words.index("recipes/train.py") + 1 :]]
    if "recipes/sweep.py" in words:
        monkeypatch.syspath_prepend(str(ROOT / "recipes"))
        path, *flags = words[words.index("recipes/sweep.py") + 1 :]
        for run in importlib.import_module("sweep").read_sweep(path, [*flags, "--use_cpu"]):
            run.parsed()
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
def test_the_readmes_commands_run_one_after_the_other(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    hub.create(name)
    hub.commit(
        name, "main", "a model", {path.name: path.read_bytes() for path in Path(save_base(Path("base"))).iterdir()}
    )
    Path("my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in addition_rows(40)))
    given = {"train": [*SHORT, "--num_eval", "8"], "evaluate": ["--num_eval", "8"], "analyze": ["--num_draws", "19"]}
    ran = []
    for words in lines("README.md"):
        if words[:2] in (["priors-peft", command] for command in ("train", "evaluate", "analyze", "push")):
            assert main([*words[1:], *given.get(words[1], [])]) == 0, words
            ran.append(words[1])
    assert ran == ["train", "evaluate", "analyze", "push"]
    card = Path("outputs/mine/README.md").read_text(encoding="utf-8")
    assert f"base_model: {name}" in card and "no prompt" in card


@pytest.mark.slow
def test_the_tasks_pages_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, data = save_base(Path("base")), write_superglue(Path("SuperGLUE"))
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
