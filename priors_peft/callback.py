"""What is seen of prompts in training: `PriorCallback` logs figures and keeps snapshots."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .analysis.geometry import effective_rank, mean_pairwise_cosine
from .inference.map import weight_factor
from .prompt import PriorPromptEncoder
from .snapshots import SNAPSHOTS, Snapshots


logger = logging.getLogger(__name__)


class PriorCallback(TrainerCallback):
    """Logs how the prompt stands to its prior and whether it has collapsed, and keeps snapshots of it.

    `prior/log_prob` (nats), `prior/weight`, `prior/effective_rank` and `prior/mean_pairwise_cosine` (mean over
    layers), `prior/drift` (from the initial prompt, in prior standard deviations): of the prompt after the step, where
    the losses beside them were computed before it. Where several prompts are trained, each figure's name ends with the
    prompt's.

    At most 32 snapshots of each prompt, evenly spaced and the last, are written with each checkpoint and at the end:
    `snapshots.safetensors` in `output_dir`, where the adapter will lie. A resumed run goes on with them.

    `PriorTrainer` adds it; another `Trainer` of a `PriorPeftModel` can too, before the callbacks that report.
    """

    def __init__(self) -> None:
        self._snapshots: dict[str, Snapshots] = {}
        self._starts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        figures: dict[str, float] = {}
        trained = dict(_trained(model))
        for name, encoder in trained.items():
            prompt = encoder()
            of_prompt = {"log_prob": encoder.log_prob(prompt).item()} if encoder.has_density else {}
            of_prompt |= {
                "weight": weight_at(getattr(model, "module", model).peft_config[name].prior_weight, args, state),
                "effective_rank": effective_rank(prompt).mean().item(),
                "mean_pairwise_cosine": mean_pairwise_cosine(prompt).mean().item(),
                "drift": encoder.drift(prompt).item(),
            }
            figures |= {f"prior/{key}" + suffix(name, list(trained)): value for key, value in of_prompt.items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        kept = [(name, encoder) for name, encoder in _trained(model) if not encoder.is_particle]
        self._snapshots = {name: Snapshots(encoder.initial_prompt) for name, encoder in kept}
        self._starts = {name: encoder.initial_prompt.clone() for name, encoder in kept}
        for name, snapshots in self._snapshots.items():
            path = snapshots_path(args, name)
            if state.global_step and path.is_file():
                try:
                    snapshots.load(path, until=state.global_step)
                except ValueError as error:
                    logger.warning("Snapshots of before are lost: %s", error)
        self._take(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if any(snapshots.is_due(state.global_step) for snapshots in self._snapshots.values()):
            self._take(model, state.global_step)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._take(model, state.global_step)
        self._write(args)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        for name, encoder in _trained(model):
            if name in self._snapshots and not torch.equal(encoder.initial_prompt, self._starts[name]):
                # The prompt that stands for a mixture is of another Gaussian than the one that was followed.
                self._snapshots[name].prompts = {0: encoder.initial_prompt.detach().float().cpu().clone()}
        best = state.best_global_step if args.load_best_model_at_end else None
        self._take(model, state.global_step if best is None else best)
        self._write(args)

    @torch.no_grad()
    def _take(self, model: Any, step: int) -> None:
        # By every process: where a user's own Trainer shards the prompt, all take part in using it.
        for name, encoder in _trained(model):
            if name in self._snapshots:
                self._snapshots[name].take(step, encoder())

    def _write(self, args: TrainingArguments) -> None:
        if not args.should_save:
            return
        for name, snapshots in self._snapshots.items():
            try:
                snapshots.save(snapshots_path(args, name))
            except OSError as error:
                # The prompt itself matters more: training goes on to where it is saved.
                logger.warning("Snapshots could not be written to %s: %s", snapshots_path(args, name), error)


def weight_at(prior_weight: float, args: TrainingArguments, state: TrainerState) -> float:
    """`prior_weight` at the present step, by the schedule of `PriorTrainingArguments`."""
    progress = state.global_step / state.max_steps if state.max_steps > 0 else 0.0
    return prior_weight * weight_factor(getattr(args, "prior_weight_schedule", "constant"), progress)


def suffix(name: str, names: Sequence[str]) -> str:
    """What tells the figures of several prompts apart."""
    return f"/{name}" if len(names) > 1 else ""


def _trained(model: Any) -> Iterator[tuple[str, PriorPromptEncoder]]:
    model = getattr(model, "module", model)
    for name in model.peft_config:
        if model.prompt_encoder[name].coordinate.requires_grad:
            yield name, model.prompt_encoder[name]


def snapshots_path(args: TrainingArguments, name: str) -> Path:
    """Where `PriorCallback` writes snapshots of a prompt."""
    # Where `save_pretrained` puts the adapter.
    return Path(args.output_dir, "" if name == "default" else name, SNAPSHOTS)
