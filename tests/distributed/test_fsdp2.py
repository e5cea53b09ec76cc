"""Raw FSDP2: a save in which only the writing process ran the prompt's pass would hang, or mix shards with tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fully_sharded import trained
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "on_gpu", [False, pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))]
)  # fmt: skip
def test_a_fully_sharded_prompt_trains_and_is_saved_as_the_whole_one(tmp_path, on_gpu):
    processes = min(4, torch.cuda.device_count()) if on_gpu else 2  # there are four rows
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)]), "OMP_NUM_THREADS": "1"}
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "fully_sharded.py"), str(tmp_path / "sharded"), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    tolerance = 1e-3 if on_gpu else 1e-4
    for tuning in ("soft", "deep"):
        whole, sharded = tmp_path / "whole" / tuning, tmp_path / "sharded" / tuning
        trained(tuning, whole, torch.device("cpu"), shard=False)
        for name in ("prior.safetensors", "adapter_model.safetensors", "logits.safetensors"):
            alone, ours = load_file(whole / name), load_file(sharded / name)
            assert alone.keys() == ours.keys()
            for key in alone:
                assert torch.allclose(ours[key], alone[key], atol=tolerance, rtol=tolerance), (tuning, key)
