"""The priors over prompts, one file a family: the family `name` is the class `NamePrior` in `name.py`."""

import importlib
import pkgutil

from ..names import unknown
from .base import Prior
from .block import BlockPrior
from .distribution import DistributionPrior, own_prior
from .empirical import EmpiricalMixturePrior, EmpiricalPrior
from .exclusion import ExclusionPrior
from .gaussian import GaussianPrior
from .interpolation import InterpolationPrior
from .low_rank import LowRankPrior
from .mixture import MixturePrior
from .moments import Moments
from .rejection import RejectionPrior
from .structured import StructuredPrior
from .task_posteriors import TaskPosteriors
from .text import TextPrior


# What families are built from. The structures of a family are its subclasses, so they must all be imported above for
# `from_state_dict` to find them.
_NOT_FAMILIES = {
    "base",
    "block",
    "chi",
    "distribution",
    "low_rank",
    "mixture",
    "moments",
    "reference",
    "rejection",
    "task_posteriors",
}


def prior_names() -> list[str]:
    """The names `PriorConfig(prior=...)` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_FAMILIES)


def prior_class(name: str) -> type[Prior]:
    """The class of the family `name`.

    Raises:
        ValueError: There is no such family.
    """
    if name not in prior_names():
        raise ValueError(f"prior must be a Prior object or {unknown(name, prior_names())}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), f"{name.capitalize()}Prior")


def prior_family(prior: Prior) -> str:
    """The family of a prior of this package, the name of its class for a user's own."""
    for kind in type(prior).__mro__ if type(prior).__module__.startswith(f"{__name__}.") else ():
        name = kind.__module__.rpartition(".")[2]
        if name in prior_names():
            return name
    return type(prior).__qualname__


__all__ = [
    "BlockPrior",
    "DistributionPrior",
    "EmpiricalMixturePrior",
    "EmpiricalPrior",
    "ExclusionPrior",
    "GaussianPrior",
    "InterpolationPrior",
    "LowRankPrior",
    "MixturePrior",
    "Moments",
    "Prior",
    "RejectionPrior",
    "StructuredPrior",
    "TaskPosteriors",
    "TextPrior",
    "own_prior",
    "prior_class",
    "prior_family",
    "prior_names",
]
