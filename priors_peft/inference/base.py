"""What an algorithm that finds a posterior is asked for."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..names import check_choice


if TYPE_CHECKING:
    from ..prompt import PriorPromptEncoder
    from ..trainer import PriorTrainer
    from .posterior import Posterior


class Inference:
    r"""How p(z | data) ∝ p(data | z)^(1/T) p(z) is found, with T the `prior_weight`: 1 is Bayes' rule, less is colder.

    One module an algorithm, found by its name: `variational` is the class `Variational` in `variational.py`. Its
    constructor takes `PriorConfig.inference_kwargs`. What it leaves as it is here is MAP's.
    """

    # Whether there must be a density to draw from: T > 0, whitened coordinates, a prior that is no point.
    samples = False
    # Whether only one prompt can be trained at a time.
    alone = False
    # Whether there is no posterior before `finish`: what was evaluated until then is not its.
    late = False
    # The temperature that suits it.
    prior_weight = 1.0
    # What suits it; None for the trainer's own.
    learning_rate: float | None = None
    # What the learning rate is multiplied by at a step of so many; None for the schedule that the arguments name.
    schedule: Callable[[int, int], float] | None = None

    def start(self, encoder: "PriorPromptEncoder") -> "Posterior | None":
        """What is trained beside the encoder's coordinate."""
        return None

    def begin(self, trainer: "PriorTrainer", name: str) -> None:
        """Called for each prompt when a trainer with training rows is made, before it shards the base model."""

    def prompts(self, model: Any, name: str) -> list[str]:
        """The prompts that are trained for the prompt `name`, itself first; called when training begins or is resumed."""
        return [name]

    def optimizer(self, trainer: "PriorTrainer") -> Optimizer | None:
        """The optimizer to train with; None for the one that the arguments name."""
        return None

    def before_step(self, trainer: "PriorTrainer") -> None:
        """Called before each optimizer step, when gradients are there."""

    def step(self, trainer: "PriorTrainer") -> None:
        """Called after each optimizer step."""

    def finish(self, trainer: "PriorTrainer") -> None:
        """Called after training: leaves the posterior in the encoder, its coordinate at the mean."""


def inference_names() -> list[str]:
    """The names `PriorConfig(inference=...)` takes."""
    modules = pkgutil.iter_modules(importlib.import_module(__package__).__path__)
    return sorted(module.name for module in modules if module.name not in ("base", "point", "posterior", "predictive"))


def inference_from(name: str, settings: dict[str, Any]) -> Inference:
    """The algorithm of that name.

    Raises:
        ValueError: There is none, or a setting is not one of its own.
    """
    check_choice("inference", name, inference_names())
    kind = getattr(importlib.import_module(f"{__package__}.{name}"), name.capitalize())
    known = list(inspect.signature(kind).parameters)
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        takes = ", ".join(known) or "nothing"
        raise ValueError(f"inference_kwargs of inference={name!r} must be among {takes}, got {', '.join(unknown)}")
    return kind(**settings)
