"""Bayesian prompt-tuning for the Hugging Face ecosystem: a prompt is a latent variable with a prior."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

# What users import from here, and where it lives; loaded on first use, so that the command line answers at once.
_LOCATIONS = {
    "PriorConfig": "config",
    "PriorPeftModel": "model",
    "get_prior_model": "model",
    "PriorPromptEncoder": "prompt",
    "PriorTrainer": "trainer",
    "PriorTrainingArguments": "training_arguments",
    "PriorCallback": "callback",
    "load_base_model": "hub.base_model",
    "pipeline": "hub.loading",
}
__all__ = [
    "PriorCallback",
    "PriorConfig",
    "PriorPeftModel",
    "PriorPromptEncoder",
    "PriorTrainer",
    "PriorTrainingArguments",
    "get_prior_model",
    "load_base_model",
    "pipeline",
]

if TYPE_CHECKING:
    from .callback import PriorCallback
    from .config import PriorConfig
    from .hub.base_model import load_base_model
    from .hub.loading import pipeline
    from .model import PriorPeftModel, get_prior_model
    from .prompt import PriorPromptEncoder
    from .trainer import PriorTrainer
    from .training_arguments import PriorTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LOCATIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LOCATIONS])
