"""Training under a prior: `PriorTrainer` and its arguments."""

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput

from .calibration import calibration_of
from .callback import PriorCallback, suffix, weight_at
from .data import IGNORED, count_supervised_tokens, padded_text, prompts_of, tokenize
from .files import check_writable
from .hub.trainer import HubTrainer
from .inference.base import inference_from
from .inference.map import choose_weight, weight_factor
from .model import PriorPeftModel
from .sharding import as_forward, share
from .tracking import TrackingCallback


# The best of 0.03, 0.1 and 0.3 in whitened coordinates, where one rate suits models of any embedding scale.
WHITENED_LEARNING_RATE = 0.3


@dataclass
class PriorTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit prompts.

    Args:
        learning_rate: 0.3 in whitened coordinates if None; in plain ones 0.3 prior standard deviations.
        max_length: Most tokens of a row, virtual tokens not counted; the model's context less the prompt if None.
        max_new_tokens: Most tokens generated for an answer in evaluation.
        posterior_draws: Prompts drawn from the posterior whose token probabilities evaluation averages; where the posterior
            is a point, as in MAP, it is the prompt itself.
        prior_weight_schedule: How `prior_weight` changes in training, see `inference.map.weight_factor`.
        train_sampling_strategy: `"random"` if None, or `"group_by_length"` where rows must be padded (ALiBi models,
            gradient checkpointing).
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "0.3 in whitened coordinates if unset; in plain ones times the prior's scale"}
    )
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, or their share if below 1"})
    ddp_broadcast_buffers: bool | None = field(
        default=False, metadata={"help": "Buffers are the prior's, and equal on all processes from the start"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "The one trainable parameter is used in every step"}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row, without virtual tokens"})
    max_new_tokens: int = field(default=32, metadata={"help": "Most tokens generated for an answer in evaluation"})
    train_sampling_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "random if unset, or group_by_length for models whose rows must be padded"},
    )
    posterior_draws: int = field(
        default=8, metadata={"help": "Prompts drawn from the posterior in evaluation, if it is not a point"}
    )
    prior_weight_schedule: str = field(
        default="constant", metadata={"help": "How prior_weight changes: constant, linear, cosine or cyclical"}
    )

    def __post_init__(self) -> None:
        if "LOCAL_RANK" in os.environ and not torch.accelerator.is_available():
            # Else accelerate takes each of the launched processes for the only one.
            if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
                self.ddp_backend = self.ddp_backend or "gloo"  # type: ignore[has-type]
            else:
                self.use_cpu = True
        super().__post_init__()
        weight_factor(self.prior_weight_schedule, 0.0)
        # Pinned memory is for copies to an accelerator; without one torch only warns.
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False


class PriorTrainer(HubTrainer):
    """`Trainer` whose objective is `mean NLL − (prior_weight / N) · log p(θ)`, in nats per supervised token.

    N is the number of supervised tokens in the training set, so `prior_weight=1` is the exact MAP estimate. The
    gradient is the same for any number of accumulation steps and processes.

    Several prompts of one model can be trained at once: every batch goes through the frozen model once, with each of
    them, and each becomes what it would have become alone. Figures are then logged for each, `loss` is their mean.

    Args:
        model: From `get_prior_model` or `PriorPeftModel.from_pretrained(..., is_trainable=True)`.
        args: The training arguments.
        train_dataset: Rows with `prompt` and `completion`, or tokenized ones with `input_ids` and `labels`.
        eval_dataset: The same for evaluation.
        processing_class: The base model's tokenizer.
        compute_metrics: Takes an `EvalPrediction` whose predictions are generated token ids and whose label ids are
            −100 outside the answer, and returns figures. If given, evaluation generates an answer for each row.
        adapter_names: The prompts to train; the active one if None.
        learning_rates: Of prompts that differ from `args.learning_rate`.
        **kwargs: The rest of `Trainer`'s arguments.

    Raises:
        TypeError: The model is not a `PriorPeftModel`, or the arguments are not `PriorTrainingArguments`.
        ValueError: The data lacks a column or a supervised token, or an argument can't be honoured here.
        OSError: `output_dir` can't be written to or has no room, found out before anything is trained.
    """

    compute_metrics: Any
    lr_scheduler: Any
    optimizer: Any

    def __init__(
        self,
        model: PriorPeftModel,
        args: PriorTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        adapter_names: Sequence[str] | None = None,
        learning_rates: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        _check_types(model, args, processing_class)
        # What is filled in depends on the model, and the caller may use the arguments again for another.
        args = PriorTrainingArguments() if args is None else copy.copy(args)
        _check_options(args, kwargs)
        if args.should_save:
            # The prompt, its prior and the optimizer's moments, in the checkpoints that are kept, one more, and at the end.
            state = model.prompt_encoder.state_dict().values()
            saved = sum(part.numel() * part.element_size() for part in state)
            saved += 16 * sum(part.numel() for part in model.prompt_encoder.parameters())
            check_writable(args.output_dir, saved * (2 + (args.save_total_limit or 1)))
        self.adapter_names = list(adapter_names or [model.active_adapter])
        _check_adapters(model, self.adapter_names, learning_rates, args)
        config = model.peft_config[self.adapter_names[0]]
        self.inference = inference_from(config.inference, config.inference_kwargs)
        usual = args.learning_rate or self.inference.learning_rate
        rates = {name: usual or _learning_rate(model, name) for name in self.adapter_names}
        self.learning_rates = rates | (learning_rates or {})
        args.learning_rate = self.learning_rates[self.adapter_names[0]]
        for name in model.peft_config:
            model.set_requires_grad(name, name in self.adapter_names)
        if args.train_sampling_strategy is None:
            packs = model.packs(training=True) and not args.gradient_checkpointing
            streams = train_dataset is not None and not hasattr(train_dataset, "__len__")
            args.train_sampling_strategy = "random" if packs or streams else "group_by_length"
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        context = getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None)
        configs = [model.peft_config[name] for name in self.adapter_names]
        length = args.max_length or (context and context - max(config.num_virtual_tokens for config in configs))
        self._max_length = length
        self._encode = encode = partial(tokenize, tokenizer=processing_class, max_length=length)
        train_dataset = None if train_dataset is None else encode(train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: encode(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = encode(eval_dataset)
        weighed = next((config.prior_weight for config in configs if config.prior_weight), 0.0)
        self.num_supervised_tokens = self._count(train_dataset, weighed)
        kwargs.setdefault("data_collator", DataCollatorForSeq2Seq(processing_class, label_pad_token_id=IGNORED))
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            **kwargs,
        )
        _check_processes(self)
        for name in self.adapter_names:
            share(model.prompt_encoder[name], args.device)
        self.model_accepts_loss_kwargs = True
        # The model also scores a row's first token where it is supervised, so all labels count.
        self._loss_shifts_labels = False
        # First, so that what reports (TensorBoard and the like) sees the figures and is still open for pictures.
        callbacks = self.callback_handler.callbacks
        callbacks[:0] = [_Inferring(self), PriorCallback(), TrackingCallback(callbacks)]
        self.calibrations = {}
        self._nll: Tensor | float = 0.0
        self._step_nll: Tensor
        self._logged_step: int | None = None

    @staticmethod
    def _count(dataset: Any, prior_weight: float) -> int | None:
        if dataset is None:
            return None
        if not hasattr(dataset, "__len__"):
            if prior_weight:
                raise ValueError(
                    f"prior_weight must be 0 for a streamed train_dataset, got {prior_weight}: log p(θ) is weighed "
                    "against the number of supervised tokens, which a stream does not tell"
                )
            return None
        count = count_supervised_tokens(dataset)
        if count == 0:
            raise ValueError("train_dataset must have supervised tokens (labels that are not -100), got none")
        return count

    # Training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last whole checkpoint in `output_dir`.

        Raises:
            FloatingPointError: The loss became NaN or infinite; the last checkpoint is as it was.
        """
        config = self.model.peft_config[self.adapter_names[0]]
        if config.prior_weight == "auto":
            config.prior_weight = choose_weight(self)
        self._nll, self._logged_step = 0.0, None
        self._begin()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint must be False for the first run, got True, but {self.args.output_dir!r} "
                    "holds no whole checkpoint"
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _begin(self) -> None:
        """Take up what an algorithm trains beside the prompt, and let go of a posterior found before, if it is not trained."""
        name, *others = self.adapter_names
        added = self.inference.prompts(self.model, name)[1:]
        if not set(added) <= set(others):
            self.adapter_names += added
            # Those of before do not know them.
            self.optimizer, self.model_wrapped = None, self.model
        for other in added:
            self.learning_rates[other] = self.learning_rates[name]
            self.model.set_requires_grad(other, True)
            share(self.model.prompt_encoder[other], self.args.device)
        for encoder in map(self.model.prompt_encoder.__getitem__, self.adapter_names):
            if not encoder.is_variational:
                encoder.posterior = None

    def _run_epoch(self, **kwargs: Any) -> None:
        # Trainer looks for the end after a step only: a run that is resumed from its last step would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective's share of one micro-batch on one process, whose sum is then the objective exactly once."""
        names = self.adapter_names
        if self.model.training and len(names) > 1:
            rows = len(inputs["input_ids"])
            inputs = {key: value.repeat(len(names), *[1] * (value.ndim - 1)) for key, value in inputs.items()}
            inputs["adapter_names"] = [name for name in names for _ in range(rows)]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.model.training:
            if self._logged_step is None:
                self._logged_step = self.state.global_step
            # Losses of micro-batches are shares of the whole batch's mean and add up, over processes too.
            nll = outputs.row_nll.view(len(names), -1).sum(1)
            self._step_nll = (
                loss.detach() * nll / nll.sum().clamp_min(torch.finfo(nll.dtype).tiny)
                if len(names) > 1
                else loss.detach()[None]
            )
            self._nll = self._nll + self._step_nll
            weights = [weight_at(self.model.peft_config[name].prior_weight, self.args, self.state) for name in names]
            if any(weights) and self.num_supervised_tokens:
                share = torch.tensor(weights, device=loss.device) / self.num_supervised_tokens
                loss = loss - (share * outputs.log_prior).sum() / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s; each of several prompts has its own learning rate, some algorithms their own optimizer."""
        if getattr(self, "optimizer", None) is None:
            self.optimizer = self.inference.optimizer(self)
        if getattr(self, "optimizer", None) is None and len(self.adapter_names) > 1:
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": list(self.model.prompt_encoder[name].parameters()), "lr": self.learning_rates[name]}
                for name in self.adapter_names
            ]
            self.optimizer = optimizer(groups, **options | {"weight_decay": self.args.weight_decay})
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer`'s; some algorithms have their own schedule."""
        schedule, optimizer = self.inference.schedule, optimizer or self.optimizer
        if schedule is not None and self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: schedule(step, num_training_steps)
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: Any) -> Any:
        if len(self.adapter_names) == 1:
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norms = [
            torch.nn.utils.clip_grad_norm_(self.model.prompt_encoder[name].parameters(), self.args.max_grad_norm)
            for name in self.adapter_names
        ]
        return torch.stack(norms).norm()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name in self.adapter_names:
            self.model.set_requires_grad(name, True)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # The likelihood alone: inside an exclusion prior's region −log p(θ) is infinite, and its gradient leads out.
        nll = self.accelerator.reduce(self._step_nll.clone(), "sum")  # so that all processes stop
        if not torch.isfinite(nll).all():
            checkpoint = last_checkpoint(self.args.output_dir)
            kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved yet"
            raise FloatingPointError(
                f"the loss became {nll.sum().item()} after step {self.state.global_step}; training was stopped before the "
                f"prompt was changed by it, and {kept}. Lower learning_rate ({self.args.learning_rate}) and resume"
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._logged_step is not None:
            names = self.adapter_names
            nll = self.accelerator.reduce(torch.as_tensor(self._nll, device=self.args.device).float(), "mean")
            steps = max(1, self.state.global_step - self._logged_step)
            for name, of_prompt in zip(names, nll.tolist(), strict=True):
                logs["prior/nll" + suffix(name, names)] = of_prompt / steps
            logs["loss"] /= len(names)
            self._nll, self._logged_step = 0.0, self.state.global_step
        super().log(logs, start_time)

    def _load_best_model(self) -> None:
        name = self.model.active_adapter
        if name == "default" or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super()._load_best_model()
        # PEFT keeps adapters of other names in subfolders, where Trainer does not look.
        self.model.load_adapter(os.path.join(self.state.best_model_checkpoint, name), name, is_trainable=True)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`'s, for rows with `prompt` and `completion` too."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else self._encode(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `Trainer`'s, for rows with `prompt` and `completion` too."""
        return super().get_test_dataloader(self._encode(test_dataset))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """`Trainer`'s loop, with a loss that is exact: nats per supervised token over all rows, not a mean of means."""
        users_metrics, active = self.compute_metrics, self.model.active_adapter
        order = _by_length(dataloader.dataset)
        self.compute_metrics = partial(_figures, users_metrics=users_metrics, order=order)
        figures: dict[str, float] = {}
        try:
            with self.model.cached_prompt():
                for name in self.adapter_names:
                    self.model.active_adapter = name
                    with self.model.averaged(self.args.posterior_draws):
                        output = super().evaluation_loop(
                            dataloader, description, False, ignore_keys, metric_key_prefix
                        )
                    self.calibrations[name] = calibration_of(torch.from_numpy(output.predictions[2]).sum(0))
                    for key, value in output.metrics.items():
                        figures[key + suffix(name, self.adapter_names)] = value
        finally:
            self.compute_metrics, self.model.active_adapter = users_metrics, active
        if len(self.adapter_names) > 1:
            losses = [value for key, value in figures.items() if key.startswith(f"{metric_key_prefix}_loss/")]
            figures[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        answers, labels = (_in_order(part, order) for part in (_generated(output.predictions), output.label_ids))
        return output._replace(predictions=answers, label_ids=labels, metrics=figures)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return _by_length(eval_dataset)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, tuple[Tensor, ...], Tensor]:
        """Likelihood of each row's answer and, if there are metrics to compute, a generated answer."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, return_logits=False)
            scores: tuple[Tensor, ...] = (outputs.row_nll, outputs.row_tokens, outputs.row_bins)
            if self.compute_metrics is not None and self.compute_metrics.keywords["users_metrics"] is not None:
                scores = (*scores, self._answers(model, inputs))
        return None, scores, inputs["labels"]

    def _answers(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        rows = prompts_of(inputs["input_ids"].tolist(), mask.tolist(), inputs["labels"].tolist())
        if self._max_length:
            # Room for the answer within the context, at the cost of the prompt's start as in training.
            room = max(1, self._max_length - self.args.max_new_tokens)
            rows = [row[-room:] for row in rows]
        prompts = padded_text(rows, self.processing_class.pad_token_id, "left", self.args.device)
        generated = as_forward(self.accelerator.unwrap_model(model), "generate")(
            **prompts,
            max_new_tokens=self.args.max_new_tokens,
            do_sample=False,
            pad_token_id=self.processing_class.pad_token_id,
        )
        return generated[:, prompts["input_ids"].shape[1] :]


class _Inferring(TrainerCallback):
    """Tells an algorithm of the steps."""

    def __init__(self, trainer: PriorTrainer) -> None:
        self._trainer = weakref.proxy(trainer)

    def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.before_step(self._trainer)

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.step(self._trainer)

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.finish(self._trainer)


def _check_types(model: Any, args: Any, processing_class: Any) -> None:
    if not isinstance(model, PriorPeftModel):
        raise TypeError(f"model must be a PriorPeftModel (see get_prior_model), got {type(model).__name__}")
    if args is not None and not isinstance(args, PriorTrainingArguments):
        raise TypeError(f"args must be PriorTrainingArguments, got {type(args).__name__}")
    if processing_class is None:
        raise ValueError("processing_class must be the base model's tokenizer, got None")


def _check_options(args: PriorTrainingArguments, options: dict[str, Any]) -> None:
    """Refuse what can't be honoured, and use one GPU where Trainer would split batches among threads."""
    for name in ("label_smoothing_factor", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name} must be off, got {getattr(args, name)}: the objective is an exact likelihood")
    for name in ("compute_loss_func", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            raise ValueError(f"{name} must be None: PriorTrainer has its own objective and evaluation")
    if args.n_gpu > 1:
        warnings.warn("Training on one GPU: start with `accelerate launch` to use all of them.")
        args._n_gpu = 1


def _check_processes(trainer: PriorTrainer) -> None:
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
    if len(trainer.adapter_names) > 1:
        raise ValueError("adapter_names must name one prompt under DeepSpeed and FSDP, which clip all as one")
    config = trainer.model.active_peft_config
    if config.inference != "map":
        raise ValueError(
            f'inference must be "map" under DeepSpeed and FSDP, got {config.inference!r}: train on one GPU'
        )
    if config.prior_weight == "auto":
        raise ValueError(
            'prior_weight must be a number under DeepSpeed and FSDP, got "auto": choose it with DDP or on one GPU'
        )
    if trainer.args.bf16 or trainer.args.fp16:
        raise ValueError(
            "bf16 and fp16 must be off under DeepSpeed and FSDP, where they would round the prompt itself: the base "
            "model's type is that of its checkpoint, or dtype's"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading):
        raise ValueError(
            "fsdp_config must have fsdp_version 2 and fsdp_cpu_ram_efficient_loading false (all processes fit the "
            f"prior), got {plugin.fsdp_version} and {plugin.cpu_ram_efficient_loading}: see accelerate_configs/fsdp2.yaml"
        )


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """The last checkpoint that was written to its end (`trainer_state.json` comes last), or None."""
    paths = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    whole = [path for path in paths if (path / "trainer_state.json").is_file() and path.name.split("-")[-1].isdigit()]
    return str(max(whole, key=lambda path: int(path.name.split("-")[-1]))) if whole else None


def _check_adapters(
    model: PriorPeftModel, names: list[str], rates: dict[str, float] | None, args: TrainingArguments
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


def _learning_rate(model: PriorPeftModel, name: str) -> float:
    if model.peft_config[name].coordinates == "whitened":
        return WHITENED_LEARNING_RATE
    scales = [prior.scale_tril.square().sum(-1).mean().sqrt() for prior in model.prompt_encoder[name].priors]
    return WHITENED_LEARNING_RATE * float(torch.stack(scales).mean())


def _by_length(dataset: Any) -> list[int] | None:
    """Rows from the longest to the shortest, so that rows that are decoded together need little padding."""
    if not isinstance(dataset, Dataset):  # a stream, which is evaluated as it comes
        return None
    lengths = [len(row) for row in dataset["input_ids"]]
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def _in_order(rows: Any, order: list[int] | None) -> Any:
    """Rows that came by length, in the data set's order; the last do not come where `dataloader_drop_last` is set."""
    return rows if rows is None or order is None else rows[np.argsort(order[: len(rows)])]


def _figures(
    prediction: EvalPrediction,
    users_metrics: Callable[[EvalPrediction], dict[str, float]] | None,
    order: list[int] | None,
) -> dict[str, float]:
    nll, tokens, bins = prediction.predictions[:3]
    figures = {"loss": float(np.sum(nll, dtype=np.float64) / max(1, np.sum(tokens)))}
    figures["ece"] = calibration_of(torch.from_numpy(bins).sum(0)).error
    if users_metrics is not None:
        answers, labels = _generated(prediction.predictions), prediction.label_ids
        figures |= users_metrics(EvalPrediction(_in_order(answers, order), _in_order(labels, order)))
    return figures


def _generated(predictions: Any) -> Any:
    return predictions[3] if isinstance(predictions, tuple) and len(predictions) > 3 else None
