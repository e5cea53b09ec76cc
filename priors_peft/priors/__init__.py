"""The priors over prompts, one file a family: the family `name` is the class `NamePrior` in `name.py`."""

import importlib
import pkgutil

from .base import Prior
from .gaussian import GaussianPrior
from .structured import StructuredPrior


_NOT_FAMILIES = {"base", "reference"}


def prior_names() -> list[str]:
    """The names `PriorConfig(prior=...)` takes."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_FAMILIES)


def prior_class(name: str) -> type[Prior]:
    """The class of the family `name`.

    Raises:
        ValueError: There is no such family.
    """
    if name not in prior_names():
        raise ValueError(f"prior must be one of {', '.join(prior_names())} or a Prior object, got {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), f"{name.capitalize()}Prior")


__all__ = ["GaussianPrior", "Prior", "StructuredPrior", "prior_class", "prior_names"]
