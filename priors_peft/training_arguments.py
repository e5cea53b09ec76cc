"""`PriorTrainingArguments`: what a training is told."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from .inference.map import weight_factor


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

    Raises:
        ValueError: A number is not positive, or there is no such schedule.
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
        for name in ("learning_rate", "max_length", "max_new_tokens", "posterior_draws"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be > 0, got {value}: leave it out for the default")
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
