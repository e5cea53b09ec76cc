"""The recipe under one process and under each of `accelerate_configs/` with two: the same prompt, saved and pushed once."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HUB, addition_rows, make_model, make_tokenizer
from safetensors.torch import load_file

from priors_peft import PriorPeftModel
from priors_peft.cli import main
from priors_peft.snapshots import SNAPSHOTS, read_snapshots


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# Deep, so that the priors' references and the saved adapter take passes through the sharded model too.
RECIPE = [
    *("--tuning", "deep", "--layers", "0,-1", "--num_virtual_tokens", "4", "--max_new_tokens", "4"),
    *("--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "2"),
    *("--hub_model_id", "user/tuned", "--hub_strategy", "end", "--report_to", "none", "--disable_tqdm", "true"),
]
QUICK = ["--prediction_loss_only", "true"]
TEMPERED = [*QUICK, "--prior_weight", "0.1", "--inference"]
RUNS = {
    "variational": [
        *TEMPERED,
        "variational",
        "--inference_kwargs",
        '{"rank": 1}',
        "--prior_kwargs",
        '{"scale": "evidence"}',
    ],
    "mixture": [*TEMPERED, "variational", "--inference_kwargs", '{"components": 3}'],
    "laplace": [*TEMPERED, "laplace", "--inference_kwargs", '{"num_draws": 2}'],
    "sghmc": [*TEMPERED, "sghmc", "--inference_kwargs", '{"num_samples": 2, "cycles": 1}'],
    "svgd": [*TEMPERED, "svgd", "--inference_kwargs", '{"num_particles": 2}'],
    # Trains the same model over and over.
    "auto": [*QUICK, "--prior_weight", "auto"],
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> list[str]:
    """The flags: a tiny model and rows of which no two are alike, as many for evaluation as two processes can't share."""
    folder = tmp_path_factory.mktemp("recipe")
    base = folder / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    files = []
    for name, rows in (("train", addition_rows(32)), ("eval", addition_rows(7, start=400))):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files += [f"--{name}_file", str(path)]
    return ["--model", str(base), *files, *RECIPE]


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory) -> Path:
    """What one process makes of it, and of each of the other runs in a folder of its name."""
    folder = tmp_path_factory.mktemp("one")
    rows = ["--per_device_train_batch_size", "4", "--use_cpu", "true"]
    for name, flags in {"": [], **RUNS}.items():
        assert main(["train", *recipe, *rows, *flags, "--output_dir", str(folder / name)]) == 0
    return folder


def launch(config: str, folder: Path, arguments: list[str], **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` of two processes on CPUs."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "tests/distributed/launched.py"), str(folder), *arguments]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    # An end to a hang, which is what is tested; it takes seconds.
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=400, cwd=str(folder)
    )


@pytest.mark.parametrize(
    ("config", "tolerance", "expected"),
    [
        ("ddp", 1e-5, {"type": "MULTI_CPU"}),
        pytest.param("zero2", 1e-4, {"type": "DEEPSPEED", "zero_stage": 2}, marks=needs_deepspeed),
        pytest.param("zero3", 1e-4, {"type": "DEEPSPEED", "zero_stage": 3}, marks=needs_deepspeed),
        ("fsdp2", 1e-4, {"type": "FSDP", "fsdp_version": 2}),
    ],
)
def test_two_processes_give_what_one_gives_and_save_and_push_once(config, tolerance, expected, recipe, one, tmp_path):
    HUB.reset()
    arguments = [*recipe, "--per_device_train_batch_size", "2", "--push_to_hub", "true"]
    tracked = config == "ddp" and importlib.util.find_spec("tensorboard") is not None
    arguments += ["--report_to", "tensorboard"] if tracked else []
    hub = HUB.environment(HF_HOME=str(tmp_path / "hf"))
    runs = {} if config == "zero2" else RUNS  # which does what DDP does
    done = launch(config, tmp_path, arguments, RUNS=json.dumps(runs), **hub)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in runs:
        check_run(one / name, tmp_path / name)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["world_size"] == 2 and expected.items() <= found.items(), found
    sharded = config in ("zero3", "fsdp2")
    assert found["held"] < 0.6 * found["all"] if sharded else found["held"] == found["all"]

    alone, ours, resumed = (
        load_file(path / "prior.safetensors") for path in (one, tmp_path / "first", tmp_path / "resumed")
    )
    assert alone.keys() == ours.keys()
    for name in alone:  # the fitted priors and the initial prompt too
        assert torch.allclose(ours[name], alone[name], atol=tolerance, rtol=0), name
    assert all(torch.equal(ours[name], resumed[name]) for name in ours)
    (steps, course), (steps_alone, course_alone) = (
        read_snapshots(path / SNAPSHOTS) for path in (tmp_path / "first", one)
    )
    assert steps == steps_alone and torch.allclose(course, course_alone, atol=tolerance, rtol=0)

    # Seven rows over two processes: the figure is of these seven, none of them twice, and there is an answer to each.
    figures, alone = (json.loads((path / "eval_results.json").read_text()) for path in (tmp_path / "first", one))
    assert figures["eval_loss"] == pytest.approx(alone["eval_loss"], abs=tolerance)
    assert figures["eval_exact_match"] == alone["eval_exact_match"]
    logged, alone = (
        json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (tmp_path / "first", one)
    )
    for name in ("loss", "prior/nll", "grad_norm"):
        assert [row[name] for row in logged if name in row] == pytest.approx(
            [row[name] for row in alone if name in row], rel=1e-3
        )

    if tracked:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = (tmp_path / "first" / "runs").iterdir()
        # One process's number, as training and the evaluation after it have a file each.
        assert len({path.name.split(".")[-2] for path in folder.iterdir()}) == 1
        events = EventAccumulator(str(folder))
        events.Reload()
        figures = {event.step: event.value for event in events.Scalars("train/prior/nll")}
        assert figures == {row["step"]: pytest.approx(row["prior/nll"]) for row in logged if "prior/nll" in row}
        assert len(events.Scalars("eval/loss")) == 1 and "prior/tokens" in events.Tags()["images"]

    # Two runs, each pushed by one process.
    assert HUB.commits("user/tuned") == ["End of training"] * 2
    stock, stock_alone = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "first", one))
    assert torch.allclose(stock["prompt_embeddings"], stock_alone["prompt_embeddings"], atol=tolerance, rtol=0)

    tuned = PriorPeftModel.from_pretrained(make_model(), str(one))
    text = make_tokenizer()(["3 plus 4"], return_tensors="pt")["input_ids"]
    assert found["answer"] == tuned.generate(text, max_new_tokens=3, do_sample=False, pad_token_id=0)[0].tolist()


def check_run(one: Path, two: Path, tolerance: float = 1e-4) -> None:
    """Two processes find what one finds, all of them, and go on from a checkpoint to the same bits."""
    assert json.loads((two / "found.json").read_text()) == {"processes": 2, "alike": True}, one.name
    alone, first, resumed = (load_file(path / "prior.safetensors") for path in (one, two / "first", two / "resumed"))
    assert alone.keys() == first.keys() == resumed.keys()
    for key in alone:  # mean, scales and draws; the prior, which the evidence has scaled
        assert torch.allclose(first[key], alone[key], atol=tolerance, rtol=tolerance), (one.name, key)
        assert torch.equal(first[key], resumed[key]), (one.name, key)
    draws = PriorPeftModel.from_pretrained(make_model(), str(two / "first")).posterior_samples(4)
    assert (len(draws.unique(dim=0)) > 1) == (one.name != "auto"), one.name
    figures = [json.loads((path / "eval_results.json").read_text()) for path in (one, two / "first")]
    assert figures[0]["eval_loss"] == pytest.approx(figures[1]["eval_loss"], rel=tolerance), one.name


def test_a_process_that_dies_ends_the_job_with_its_error(recipe, tmp_path):
    done = launch("cpu", tmp_path, [*recipe, "--per_device_train_batch_size", "2"], DYING_RANK="1")
    assert done.returncode != 0 and "this process dies of a planted error" in done.stderr
    assert not (tmp_path / "first" / "prior.safetensors").exists()
