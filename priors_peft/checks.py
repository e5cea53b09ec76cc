"""What `PriorTrainer` refuses, before anything is trained."""

import warnings
from typing import TYPE_CHECKING, Any

import torch

from .inference.base import inference_from
from .model import PriorPeftModel
from .sharding import as_launched
from .training_arguments import PriorTrainingArguments


if TYPE_CHECKING:
    from .trainer import PriorTrainer


def check_types(model: Any, args: Any, processing_class: Any) -> None:
    if not isinstance(model, PriorPeftModel):
        raise TypeError(f"model must be a PriorPeftModel (see get_prior_model), got {type(model).__name__}")
    if args is not None and not isinstance(args, PriorTrainingArguments):
        raise TypeError(f"args must be PriorTrainingArguments, got {type(args).__name__}")
    if processing_class is None:
        raise ValueError("processing_class must be the base model's tokenizer, got None")


def check_options(args: PriorTrainingArguments, options: dict[str, Any]) -> None:
    """Refuse what can't be honoured, and use one GPU where Trainer would split batches among threads."""
    for name in (
        "label_smoothing_factor",
        "neftune_noise_alpha",
        "batch_eval_metrics",
        "bf16_full_eval",
        "fp16_full_eval",
    ):
        if getattr(args, name):
            raise ValueError(f"{name} must be off, got {getattr(args, name)}: the objective is an exact likelihood")
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None: PriorTrainer has its own objective and evaluation")
    if args.n_gpu > 1:
        warnings.warn("Training on one GPU: start with `accelerate launch` to use all of them.")
        args._n_gpu = 1


def check_processes(trainer: "PriorTrainer") -> None:
    """Refuse what can't be honoured on several processes, or by what shards a model over them."""
    rows, processes = trainer.train_dataset, trainer.args.world_size
    started = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if started != processes:
        raise ValueError(
            f"the launcher started {started} processes, but accelerate sees {processes}: start them with a file of "
            "accelerate_configs/"
        )
    if hasattr(rows, "__len__") and len(rows) < processes:
        raise ValueError(
            f"train_dataset must have a row for each of the {processes} processes, got {len(rows)} rows: start fewer "
            f"processes (--num_processes {len(rows)}) or give more rows"
        )
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return
    if trainer.args.bf16 or trainer.args.fp16:
        raise ValueError(
            "bf16 and fp16 must be off under DeepSpeed and FSDP, which would cast the base model: its type is that of "
            "its checkpoint, or dtype's"
        )
    with as_launched():
        settings = getattr(getattr(trainer.accelerator.state, "deepspeed_plugin", None), "deepspeed_config", {})
    if settings.keys() & {"optimizer", "scheduler"}:
        raise ValueError(
            f"DeepSpeed's settings must not name {', '.join(sorted(settings.keys() & {'optimizer', 'scheduler'}))}: "
            "prompts are not sharded; optim, learning_rate and lr_scheduler_type say how they are trained"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading):
        raise ValueError(
            "fsdp_config must have fsdp_version 2 and fsdp_cpu_ram_efficient_loading false (all processes fit the "
            f"prior), got {plugin.fsdp_version} and {plugin.cpu_ram_efficient_loading}: see accelerate_configs/fsdp2.yaml"
        )


def check_adapters(
    model: PriorPeftModel, names: list[str], rates: dict[str, float] | None, args: PriorTrainingArguments
) -> None:
    for argument, given in (("adapter_names", names), ("learning_rates", rates or {})):
        valid = list(model.peft_config) if argument == "adapter_names" else names
        if not set(given) <= set(valid) or len(set(given)) != len(given):
            raise ValueError(f"{argument} must name prompts among {valid}, each once, got {list(given)}")
    alone = [model.peft_config[name].inference for name in names]
    alone = [kind for kind in alone if inference_from(kind, {}).alone]
    if alone and len(names) > 1:
        raise ValueError(f"adapter_names must name one prompt for inference={alone[0]!r}, got {names}")
    if alone and args.load_best_model_at_end:
        raise ValueError(
            f"load_best_model_at_end must be False for inference={alone[0]!r}, which needs the last state"
        )
    if len(names) > 1:
        if args.load_best_model_at_end:
            raise ValueError("load_best_model_at_end must be False for several adapter_names, whose best steps differ")
        if any(model.peft_config[name].prior_weight == "auto" for name in names):
            raise ValueError('prior_weight must be a number for several adapter_names, got "auto"')
