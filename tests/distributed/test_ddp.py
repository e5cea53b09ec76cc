"""Two processes take the step that one takes, prior term included, and save once."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from test_trainer import Gradients, make_trainer

from priors_peft.snapshots import SNAPSHOTS, read_snapshots


TESTS = Path(__file__).parents[1]


def train(folder: str) -> None:
    """One optimizer step on 16 rows, shared by the processes; keeps the gradient and the prompt."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    gradients = Gradients()
    trainer = make_trainer(
        folder,
        config={"num_virtual_tokens": 4, "prior_weight": 1.0},
        callbacks=[gradients],
        max_steps=1,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
    )
    assert trainer.args.world_size == processes
    trainer.train()
    trainer.save_model()
    if trainer.is_world_process_zero():
        encoder = trainer.model.prompt_encoder["default"]
        figures = torch.tensor([trainer.evaluate()["eval_loss"], trainer.state.log_history[0]["prior/nll"]])
        state = {"gradient": gradients.seen[0], "prompt": encoder().detach(), "figures": figures}
        save_file(state, Path(folder) / "state.safetensors")
    else:
        trainer.evaluate()


def main(folder: str) -> None:
    """As `priors-peft train` does: free the model before its process group, then end together."""
    train(folder)
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    code = "import sys; from test_ddp import main; main(sys.argv[1])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS / "distributed")])}
    script = tmp_path / "run.py"
    script.write_text(code)
    commands = {
        1: [sys.executable, str(script)],
        2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
    }
    states = {}
    for processes, command in commands.items():
        folder = tmp_path / str(processes)
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        states[processes] = load_file(folder / "state.safetensors")
        steps, course = read_snapshots(folder / SNAPSHOTS)
        assert steps == [0, 1]
        states[processes]["course"] = course
    one, two = states[1], states[2]
    assert torch.allclose(one["course"], two["course"], atol=1e-5)
    assert (one["gradient"] - two["gradient"]).norm() < 1e-5 * one["gradient"].norm()
    assert torch.allclose(one["prompt"], two["prompt"], atol=1e-5)
    assert torch.allclose(one["figures"], two["figures"], rtol=1e-5)
