"""What each process of `test_launchers` runs: the recipe, the same resumed, and what only several processes can show."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from transformers import TrainerCallback

from priors_peft.commands import train
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.sharding import as_launched
from priors_peft.trainer import PriorTrainer


TRAINERS: list[PriorTrainer] = []


class Trainer(PriorTrainer):
    """Is kept, so that it can be looked at; dies in one process if it is told so."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        TRAINERS.append(self)
        if "DYING_RANK" in os.environ:
            self.add_callback(Dying())


class Dying(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if str(args.process_index) == os.environ["DYING_RANK"]:
            raise RuntimeError("this process dies of a planted error")


def without_gpu() -> None:
    """What DeepSpeed and FSDP2 do on GPUs, with gloo and the tiny model."""
    with contextlib.suppress(ImportError):
        import deepspeed

        # It would be compiled, for a minute; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    began, finished = PartialState.__init__, DeepSpeedPlugin.__post_init__

    def begin(self, *args, **kwargs):
        began(self, *args, **kwargs)
        # Accelerate has FSDP for GPUs only, and silently runs DDP on CPUs.
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def finish(self):
        finished(self)
        # ZeRO-3 does not partition tensors as small as all of the tiny model's are.
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    PartialState.__init__, DeepSpeedPlugin.__post_init__ = begin, finish


def run(arguments: list[str]) -> Trainer:
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, train.TrainingArguments)
    train.train(*parse(dataclasses, arguments, "train"))
    return TRAINERS[-1]


def checks(trainer: Trainer) -> dict:
    """What the parent process is to see, from the first process."""
    state, rank = trainer.accelerator.state, trainer.args.process_index
    parameters = list(trainer.model.base_model.parameters())
    # Every process answers its own number of tokens: one that is done must not leave the others waiting.
    texts = trainer.processing_class(["3 plus 4"], return_tensors="pt")
    answer = trainer.model.generate(
        input_ids=texts["input_ids"],
        attention_mask=texts["attention_mask"],
        max_new_tokens=3 * (rank + 1),
        do_sample=False,
        pad_token_id=0,
    )
    plugin = getattr(state, "fsdp_plugin", None)
    with as_launched():
        launched = str(state.distributed_type.value)
        zero_stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin else None
    return {
        "world_size": trainer.args.world_size,
        "type": launched,
        "zero_stage": zero_stage,
        "fsdp_version": plugin.fsdp_version if isinstance(plugin, FullyShardedDataParallelPlugin) else None,
        "held": sum(getattr(part, "ds_tensor", getattr(part, "_local_tensor", part)).numel() for part in parameters),
        "all": sum(getattr(part, "ds_numel", part.numel()) for part in parameters),
        "answer": answer[0].tolist(),
        "dtype": str(parameters[0].dtype),
    }


def first_of_two(folder: Path, arguments: list[str], look: Callable[[Trainer], dict]) -> list[str]:
    """One run, and what is seen of it; returns the flags that resume it from half way."""
    first, resumed = folder / "first", folder / "resumed"
    trainer = run([*arguments, "--output_dir", str(first)])
    found = look(trainer)
    if trainer.is_world_process_zero():
        (folder / "found.json").write_text(json.dumps(found))
        shutil.copytree(first / "checkpoint-2", resumed / "checkpoint-2")
    trainer.accelerator.wait_for_everyone()
    TRAINERS.clear()
    return [*arguments, "--output_dir", str(resumed), "--resume"]


def draws_of_all(trainer: Trainer) -> dict:
    """Whether all processes draw the same prompts from the posterior."""
    draws = trainer.accelerator.gather(trainer.model.posterior_samples(3)[None])
    return {"processes": len(draws), "alike": all(torch.equal(draws[0], other) for other in draws)}


def main(folder: Path, arguments: list[str]) -> None:
    for name, flags in json.loads(os.environ.get("RUNS", "{}")).items():
        flags = [*arguments, *flags, "--push_to_hub", "false", "--report_to", "none"]
        run(first_of_two(folder / name, flags, draws_of_all))
    # The last run ends as users' do.
    train.main(first_of_two(folder, arguments, checks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        without_gpu()
    train.PriorTrainer = Trainer
    main(Path(sys.argv[1]), sys.argv[2:])
