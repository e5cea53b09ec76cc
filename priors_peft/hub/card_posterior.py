"""What a model card says of a prompt's posterior, and of how sure the prompt is."""

import contextlib
from typing import TYPE_CHECKING, Any

from ..analysis.claims import plural
from .adapter import PRIOR_WEIGHTS


if TYPE_CHECKING:
    from .card import Facts

RELIABILITY = "reliability"


def has_posterior(facts: "Facts") -> bool:
    """Whether the prompt's posterior is more than a point."""
    return facts.config.get("inference", "map") != "map"


def label(facts: "Facts", name: str) -> str:
    """A row of the results, or a panel of the diagram, by the name that the facts have it under."""
    if name.startswith("averaged over "):
        name = f"this prompt, {name}"
    if name == "this prompt" and has_posterior(facts):
        name = "this prompt alone"
    own, comma, part = name.partition(", ")
    if own in facts.training.results and facts.training.posterior_draws:
        name = f"{own}, averaged over {plural(facts.training.posterior_draws, 'draw')}{comma}{part}"
    return name.replace("default", "this prompt", 1) if name.startswith("default") else name


def calibrations(facts: "Facts") -> dict[str, dict[str, Any]]:
    """Calibration of what was measured, by label: what `priors-peft evaluate` found, else training's evaluation."""
    found = facts.evaluation.get("calibration") or {}
    order = ["no prompt", "this prompt", *(name for name in found if name.startswith("averaged over "))]
    if not found:
        found = facts.training.calibration
        order = sorted(found, key=lambda name: (" alone" not in name, name))
    return {label(facts, name): found[name] for name in order if name in found}


def posterior(facts: "Facts") -> str | None:
    """What was drawn and how often, in one sentence; None for a point."""
    if not has_posterior(facts):
        return None
    shapes = _shapes(facts)
    gaussians = shapes.pop("posterior.means", [0])[0] + 1
    count = next((shape[0] for shape in shapes.values()), 0)
    what = {
        "sghmc": f"{plural(count, 'draw')} of a Markov chain (stochastic gradient Hamiltonian Monte Carlo)",
        "svgd": f"{plural(count, 'particle')} (Stein variational gradient descent)",
        "laplace": f"a Gaussian about the mode, narrower than the prior in {plural(count, 'direction')} (Laplace)",
        "variational": ("a Gaussian" if gaussians == 1 else f"a mixture of {gaussians} Gaussians, each")
        + " with a variance for each coordinate"
        + (f" and {plural(count, 'direction')} in which they vary together" if count else "")
        + " (variational inference)",
    }
    told = what.get(facts.config["inference"], "an algorithm of its author's") if shapes else "not in this folder"
    mean = "its mean" if gaussians == 1 else "the mean of one of them"
    held = "the draw that predicts most as their average does" if "point" in shapes else mean
    return (
        f"The posterior is {told}. The adapter holds {held}; figures “averaged over” draws are of token probabilities "
        "averaged over that many prompts drawn from it, as within `model.averaged(8)`."
    )


def _shapes(facts: "Facts") -> dict[str, list[int]]:
    """Shapes of the posterior's tensors, those first whose length is a number of Gaussians, draws or directions, and its point's."""
    from safetensors import safe_open

    path = facts.folder / facts.adapters[facts.name][0] / PRIOR_WEIGHTS
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as tensors:
        kinds = ("means", "draws", "directions", "factor", "gaussians.0.factor", "rho")
        names = [*(f"posterior.{name}" for name in kinds), "point"]
        return {name: tensors.get_slice(name).get_shape() for name in names if name in tensors.keys()}  # noqa: SIM118


def draw_reliability(facts: "Facts") -> None:
    """Write the reliability diagram into the folder, where there is one to draw and something to draw it with."""
    from ..analysis.pictures import reliability, save_figures

    # Without matplotlib the card has the figures alone; of damaged files it says more than could be said here.
    with contextlib.suppress(ImportError, KeyError, TypeError, AttributeError, ValueError, IndexError):
        found = calibrations(facts)
        if found:
            save_figures({RELIABILITY: lambda: reliability.draw(found)}, facts.folder)
