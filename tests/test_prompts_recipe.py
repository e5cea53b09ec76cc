"""The prompts recipe: its table is what evaluation says, what is done is not done again, and the notebook is the recipe."""

import ast
import csv
import importlib
import math
import os
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import save_base

from priors_peft import load_base_model
from priors_peft.cli import main as cli
from priors_peft.evaluation import answer
from priors_peft.tasks import load_task


RECIPE = Path(__file__).parents[1] / "recipes" / "prompts"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    yield importlib.import_module("run")
    sys.modules.pop("run", None)


@pytest.fixture
def notebook():
    return pytest.importorskip("nbformat").read(RECIPE / "prompts.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    return "".join(out.text for cell in code_cells(notebook) for out in cell.outputs if out.get("name") == "stdout")


def test_the_notebook_is_the_recipe_and_was_run(notebook):
    source = (RECIPE / "run.py").read_text(encoding="utf-8")
    (main,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    lines = textwrap.dedent("\n".join(source.splitlines()[main.lineno : main.end_lineno])).splitlines()
    flags, imports, *cells = (cell.source for cell in code_cells(notebook))
    assert flags.startswith("arguments = ") and imports.startswith("from run import ")
    kept = [line for line in lines if line and not line.startswith("# ----")]
    assert [line for cell in cells for line in cell.splitlines() if line] == kept
    readme = (RECIPE / "README.md").read_text(encoding="utf-8")
    table = [line for line in printed(notebook).splitlines() if line.startswith("|")]
    assert len(table) == 5 and "\n".join(table) in readme
    assert "/tmp" not in str(notebook) and "/home" not in str(notebook)


@pytest.mark.slow
def test_the_notebook_runs_and_the_recipe_after_it_finds_all_done(run, notebook, tmp_path, monkeypatch, capsys):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    model = os.environ.get("PRIORS_PEFT_TINY_MODEL") or save_base(tmp_path / "base")
    data = os.environ.get("PRIORS_PEFT_DATA_DIR") and str(Path(os.environ["PRIORS_PEFT_DATA_DIR"], "prompts"))
    if not data:
        rows = [("act", "prompt"), *((f"Role {n}", f"what is {n} plus {2 * n} ?") for n in range(60))]
        with open(tmp_path / "prompts.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        data = str(tmp_path)
    arguments = ["--model", model, "--data_dir", data, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    arguments += ["--max_steps", "3", "--max_length", "24", "--disable_tqdm", "true"]
    # As the README says: what `priors-peft train` trained is found.
    first = [
        "--num_virtual_tokens",
        "5",
        "--num_train_epochs",
        "5",
        "--output_dir",
        str(tmp_path / "out" / "5_tokens_5_epochs"),
    ]
    assert cli(["train", str(RECIPE / "soft_structured.yaml"), *arguments, *first]) == 0
    code_cells(notebook)[0].source = f"arguments = {arguments!r}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(RECIPE)}}).execute()
    table = [line for line in printed(notebook).splitlines() if line.startswith("|")]
    assert "Training 5_tokens" not in printed(notebook) and "Training 20_tokens" in printed(notebook)

    monkeypatch.setattr(run, "train", lambda *given: pytest.fail("it was done"))
    capsys.readouterr()
    run.main(arguments)
    again = capsys.readouterr().out
    assert "\n".join(table) in again
    for opening in run.OPENINGS:
        assert f"\n{opening} (none of the prompts to learn from begin so)\n- no prompt: " in f"\n{again}"

    base, tokenizer = load_base_model(model)
    rows = load_task("prompts", data_dir=data, num_eval=34, template="").eval
    room = base.config.max_position_embeddings - 20
    rows = [row for row in rows if len(tokenizer(row["completion"]).input_ids) + 2 <= room]
    nll = float(table[2].split("|")[2])
    if len(rows) == 34:  # else the table's are cut
        assert answer(base, tokenizer, rows, 1).nll == pytest.approx(nll, abs=6e-4)
    assert float(table[2].split("|")[3]) == pytest.approx(math.exp(nll), rel=1e-3)
    with pytest.raises(ValueError, match="learning_rate must be None as when .*5_tokens_5_epochs was begun, got 0.1"):
        run.main([*arguments, "--learning_rate", "0.1"])
    begun = tmp_path / "out" / "20_tokens_10_epochs"
    (begun / "prior_config.json").unlink()  # stopped before its last file was written
    with pytest.raises(ValueError, match="max_steps must be 3 as when .*20_tokens_10_epochs was begun, got 4"):
        run.train_one(20, 10, run.read([*arguments, "--max_steps", "4"]))
