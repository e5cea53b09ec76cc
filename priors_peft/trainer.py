"""Training under a prior: `PriorTrainer`."""

import copy
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, EvalPrediction, TrainerCallback

from .callback import PriorCallback, suffix, weight_at
from .checkpoints import check_checkpoint, last_checkpoint, pass_over_checkpoints, weight_of
from .checks import check_adapters, check_options, check_processes, check_types
from .data import IGNORED, count_supervised_tokens, tokenize
from .evaluating import LikelihoodTrainer
from .files import check_writable
from .inference.base import inference_from
from .inference.map import choose_weight
from .inference.point import choose_point
from .model import PriorPeftModel
from .sharding import as_launched, is_sharded, prompts_as_ddp, shard_base_model, share
from .tracking import TrackingCallback
from .training_arguments import PriorTrainingArguments


logger = logging.getLogger(__name__)

# The best of 0.03, 0.1 and 0.3 in whitened coordinates, where one rate suits models of any embedding scale. For one layer.
WHITENED_LEARNING_RATE = 0.3


class PriorTrainer(LikelihoodTrainer):
    """`Trainer` whose objective is `mean NLL − (prior_weight / N) · log p(θ)`, in nats per supervised token.

    N is the number of supervised tokens in the training set, so `prior_weight=1` is the exact MAP estimate. The
    gradient is the same for any number of accumulation steps and processes.

    Several prompts of one model can be trained at once: every batch goes through the frozen model once, with each of
    them, and each becomes what it would have become alone. Figures are then logged for each, `loss` is their mean.

    Args:
        model: From `get_prior_model` or `PriorPeftModel.from_pretrained(..., is_trainable=True)`.
        args: The training arguments.
        train_dataset: Rows with `prompt` and `completion`, `messages` or `text`, or tokenized with `input_ids` and `labels`.
        eval_dataset: The same for evaluation.
        processing_class: The base model's tokenizer.
        compute_metrics: Takes an `EvalPrediction` whose predictions are generated token ids and whose label ids are
            −100 outside the answer, and returns figures. If given, evaluation generates an answer for each row.
        adapter_names: The prompts to train; the active one if None. If it is not among them, the first becomes active.
        learning_rates: Of prompts that differ from `args.learning_rate`.
        **kwargs: The rest of `Trainer`'s arguments.

    Raises:
        TypeError: The model is not a `PriorPeftModel`, or the arguments are not `PriorTrainingArguments`.
        ValueError: The data lacks a column or a supervised token, or an argument can't be honoured here.
        OSError: `output_dir` can't be written to or has no room, found out before anything is trained.
    """

    lr_scheduler: Any
    optimizer: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

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
        check_types(model, args, processing_class)
        # What is filled in depends on the model, and the caller may use the arguments again for another.
        args = PriorTrainingArguments() if args is None else copy.copy(args)
        check_options(args, kwargs)
        _check_room(model, args)
        self.adapter_names = list(adapter_names or [model.active_adapter])
        check_adapters(model, self.adapter_names, learning_rates, args)
        kinds = [
            inference_from(of.inference, of.inference_kwargs) for of in map(model.peft_config.get, self.adapter_names)
        ]
        # Several prompts are points or variational; points ask for nothing.
        self.inference = next((kind for kind in kinds if kind.samples), kinds[0])
        usual = args.learning_rate or self.inference.learning_rate
        rates = {name: usual or _learning_rate(model, name) for name in self.adapter_names}
        self.learning_rates = rates | (learning_rates or {})
        args.learning_rate = self.learning_rates[self.adapter_names[0]]
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
        check_processes(self)
        if train_dataset is not None:
            for name, kind in zip(self.adapter_names, kinds, strict=True):
                kind.begin(self, name)
            _check_room(model, args)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            shard_base_model(self)
            # To Trainer, from here on, it is DDP.
            self.is_deepspeed_enabled = self.is_fsdp_enabled = False
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
        """Train; `resume_from_checkpoint=True` goes on from the last whole checkpoint of the last run in `output_dir`.

        Raises:
            FloatingPointError: The loss became NaN or infinite; the last checkpoint is as it was.
            ValueError: There is no whole checkpoint, or it is under another prior or of another algorithm.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint must be False for the first run, got True, but {self.args.output_dir!r} "
                    "holds no whole checkpoint"
                )
        for name in self.adapter_names if resume_from_checkpoint else ():
            check_checkpoint(self.model, name, str(resume_from_checkpoint))
        # Only now: another trainer of the same model may have trained others in between.
        if self.model.active_adapter not in self.adapter_names:
            self.model.active_adapter = self.adapter_names[0]
        for name in self.model.peft_config:
            self.model.set_requires_grad(name, name in self.adapter_names)
        config = self.model.peft_config[self.adapter_names[0]]
        if config.prior_weight == "auto":
            chosen = weight_of(resume_from_checkpoint, self.adapter_names[0]) if resume_from_checkpoint else None
            config.prior_weight = choose_weight(self) if chosen is None else chosen
            if chosen is not None:
                logger.warning("prior_weight=%g is the checkpoint's and was not chosen again", chosen)
        self._nll, self._logged_step = 0.0, None
        self._begin()
        if not resume_from_checkpoint and self.args.should_save:
            pass_over_checkpoints(self.args.output_dir)
        before, self.model.weighs_prior = self.model.weighs_prior, True
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.model.weighs_prior = before

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
                encoder.posterior = encoder.point = None

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`'s; what it makes of DeepSpeed or FSDP holds until the base model is sharded."""
        with as_launched():
            super().create_accelerator_and_postprocess()

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        wrapped = super()._wrap_model(model, training, dataloader)
        if training and wrapped is self.model and is_sharded(wrapped):
            return prompts_as_ddp(wrapped, **self.accelerator.ddp_handler.to_kwargs())
        return wrapped

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
        before = list(self.model.prompt_encoder.parameters())
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name in self.adapter_names:
            self.model.set_requires_grad(name, True)
        now = list(self.model.prompt_encoder.parameters())
        if list(map(id, now)) != list(map(id, before)):  # a posterior of as many Gaussians as the checkpoint's
            self.optimizer, self.model_wrapped = None, self.model

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
        if name == "default":
            return super()._load_best_model()
        # PEFT keeps adapters of other names in subfolders, where Trainer does not look.
        self.model.load_adapter(os.path.join(self.state.best_model_checkpoint, name), name, is_trainable=True)


class _Inferring(TrainerCallback):
    """Tells an algorithm of the steps, and prompts which noise is theirs."""

    def __init__(self, trainer: PriorTrainer) -> None:
        self._trainer: Any = weakref.proxy(trainer)

    def on_step_begin(self, args: Any, state: Any, *arguments: Any, **kwargs: Any) -> None:
        # By the step alone: the same in a run that is resumed, on all processes, and whatever else is trained or drawn.
        for name in self._trainer.adapter_names:
            seed = args.seed + self._trainer.model.peft_config[name].seed
            noise = torch.Generator().manual_seed(seed * 1_000_003 + state.global_step)
            self._trainer.model.prompt_encoder[name].noise = noise

    def on_pre_optimizer_step(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.before_step(self._trainer)

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.step(self._trainer)

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._trainer.inference.finish(self._trainer)
        for name in self._trainer.adapter_names:
            self._trainer.model.prompt_encoder[name].noise = None
            choose_point(self._trainer, name)


def _check_room(model: PriorPeftModel, args: PriorTrainingArguments) -> None:
    if args.should_save:
        # The prompt, its prior and the optimizer's moments, in the checkpoints that are kept, one more, and at the end.
        state = model.prompt_encoder.state_dict().values()
        saved = sum(part.numel() * part.element_size() for part in state)
        saved += 16 * sum(part.numel() for part in model.prompt_encoder.parameters())
        check_writable(args.output_dir, saved * (2 + (args.save_total_limit or 1)))


def _learning_rate(model: PriorPeftModel, name: str) -> float:
    priors = model.prompt_encoder[name].priors
    # What a step changes adds up over the layers of a deep prompt.
    rate = WHITENED_LEARNING_RATE / len(priors) ** 0.5
    if model.peft_config[name].coordinates == "whitened":
        return rate
    scales = [prior.scale_tril.square().sum(-1).mean().sqrt() for prior in priors]
    return rate * float(torch.stack(scales).mean())
