"""Shape and place of a set of prompt vectors: how many directions it fills, whether it collapsed, where it lies.

Measures take leading dimensions, so that one call gives a trajectory `[T, P, d]` or draws from a prior `[n, P, d]`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..names import check_at_least
from ..priors.base import Prior
from .common import (
    Ids,
    Result,
    band,
    check_points,
    check_same_shape,
    check_same_width,
    kept_rows,
    percentile_among,
    sample_rows,
)
from .discrepancy import median_distance, squared_mmd
from .tokens import best_scores


def effective_rank(prompt: Tensor) -> Tensor:
    """Exponential of the entropy of the normalized singular values, between 1 and min(P, d).

    Roy & Vetterli (2007), "The effective rank". Vectors are not centred: copies of one vector have rank 1.

    Args:
        prompt: Shape `[..., P, d]`.

    Returns:
        Shape `[...]`.
    """
    values = torch.linalg.svdvals(prompt.float())
    shares = values / values.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp()


def mean_pairwise_cosine(prompt: Tensor) -> Tensor:
    """Mean cosine between different virtual tokens, in [-1, 1]; 1 means total collapse. Needs P >= 2, else nan.

    Args:
        prompt: Shape `[..., P, d]`.

    Returns:
        Shape `[...]`.
    """
    unit = torch.nn.functional.normalize(prompt.float(), dim=-1)
    count = prompt.shape[-2]
    total = unit.sum(-2).square().sum(-1) - unit.square().sum((-1, -2))
    return total / (count * (count - 1)) if count > 1 else torch.full_like(total, torch.nan)


def norm_percentile(prompt: Tensor, vocabulary: Tensor, excluded: Ids | None = None) -> Tensor:
    """Percent of the vocabulary's rows that are shorter than each virtual token: `[..., P, d]` to `[..., P]`."""
    prompt = check_points("prompt", prompt, "[..., P, d]")
    vocabulary = check_points("vocabulary", vocabulary, "[V, d]")
    check_same_width("prompt", prompt, "vocabulary", vocabulary)
    kept = kept_rows(len(vocabulary), excluded).to(vocabulary.device)
    norms = torch.cat([vocabulary[ids].double().norm(dim=-1) for ids in kept.split(8192)])
    return percentile_among(prompt.double().norm(dim=-1), norms)


def mahalanobis_radius(prompt: Tensor, prior: Prior) -> Tensor:
    """Distance |A⁻¹(θ_p − µ)| of each virtual token from the prior's location, in prior standard deviations.

    Args:
        prompt: Shape `[..., P, d]`.
        prior: Of the prompt's layer; about √d where the prior is Gaussian.

    Returns:
        Shape `[..., P]`.
    """
    with torch.no_grad():
        return prior.to_whitened(check_points("prompt", prompt, "[..., P, d]")).double().norm(dim=-1)


def chi_percentile(radius: Tensor, dim: int) -> Tensor:
    """Percent of a Gaussian prior's virtual tokens that lie nearer to its location: the chi distribution's CDF.

    Exact where the prior is Gaussian with the scale factor it whitens by; of other families the draws tell.

    Args:
        radius: `mahalanobis_radius`, any shape.
        dim: Width d of the prompt, the degrees of freedom.
    """
    from ..priors.chi import log_survival

    check_at_least("dim", dim, 1)
    survival = log_survival(dim, radius.double().cpu().numpy().ravel())
    return torch.from_numpy(-100 * np.expm1(survival)).reshape(radius.shape)


def token_drift(prompt: Tensor, initial_prompt: Tensor, prior: Prior) -> Tensor:
    """Distance of each virtual token from where it started, root mean square over coordinates, in prior deviations.

    The root mean square over virtual tokens is `PriorPromptEncoder.drift`. Two draws from the prior are about √2
    apart.

    Args:
        prompt: Shape `[..., P, d]`.
        initial_prompt: Shape `[P, d]`.
        prior: Of the prompt's layer.

    Returns:
        Shape `[..., P]`.
    """
    prompt = check_points("prompt", prompt, "[..., P, d]")
    initial_prompt = check_points("initial_prompt", initial_prompt, "[P, d]")
    if prompt.shape[-2:] != initial_prompt.shape:
        raise ValueError(
            f"initial_prompt must have the prompt's shape {list(prompt.shape[-2:])}, got {list(initial_prompt.shape)}"
        )
    with torch.no_grad():
        step = prior.to_whitened(prompt) - prior.to_whitened(initial_prompt)
    return step.double().square().mean(-1).sqrt()


# One prompt, token by token; and a trajectory, measure by measure.


@dataclass(frozen=True, eq=False)
class TokenGeometry(Result):
    """Where each virtual token lies; all of shape `[P]`.

    Attributes:
        norm: Length.
        norm_percentile: Percent of the vocabulary's rows that are shorter.
        radius: Mahalanobis radius under the prior, in prior standard deviations.
        radius_percentile: Percent of the virtual tokens of the prior's draws that lie further in.
        radius_chi_percentile: The same by the chi distribution, exact for Gaussian priors.
        drift: From the initial prompt, in prior standard deviations.
    """

    norm: Tensor
    norm_percentile: Tensor
    radius: Tensor
    radius_percentile: Tensor
    radius_chi_percentile: Tensor
    drift: Tensor


def token_geometry(
    prompt: Tensor,
    initial_prompt: Tensor,
    draws: Tensor,
    prior: Prior,
    vocabulary: Tensor,
    excluded: Ids | None = None,
) -> TokenGeometry:
    """Where each virtual token of a prompt `[P, d]` lies; arguments as in `geometry_series`."""
    prompt, draws = check_points("prompt", prompt, "[P, d]"), check_points("draws", draws, "[n, P, d]")
    radius = mahalanobis_radius(prompt, prior)
    return TokenGeometry(
        norm=prompt.double().norm(dim=-1),
        norm_percentile=norm_percentile(prompt, vocabulary, excluded),
        radius=radius,
        radius_percentile=percentile_among(radius, mahalanobis_radius(draws, prior).flatten()),
        radius_chi_percentile=chi_percentile(radius, prompt.shape[-1]),
        drift=token_drift(prompt, initial_prompt, prior),
    )


@dataclass(frozen=True, eq=False)
class Measure(Result):
    """One measure over a trajectory, beside what the prior itself expects of it.

    Attributes:
        unit: Of the values.
        values: At each snapshot, shape `[T]`.
        band: 5th and 95th percentile over the prior's draws, shape `[2]`.
        median: Over the prior's draws.
        percentile: Percent of the draws with a lower value, shape `[T]`.
        posterior: 5th and 95th percentile over draws from the posterior, shape `[2]`; None of a point.
    """

    unit: str
    values: Tensor
    band: Tensor
    median: float
    percentile: Tensor
    posterior: Tensor | None = None


@dataclass(frozen=True, eq=False)
class GeometrySeries(Result):
    """Geometry of a prompt over training.

    Attributes:
        steps: Training step of each snapshot.
        measures: `effective_rank`, `mean_pairwise_cosine`, `nearest_cosine`, `norm`, `norm_percentile`, `radius`
            and `radius_chi_percentile` (these five means over virtual tokens), `drift` and `squared_mmd`. Of a single
            virtual token there is no `mean_pairwise_cosine` and no `squared_mmd`.
        num_draws: Prompts drawn from the prior.
        bandwidth: σ of the discrepancy's kernel, one for all snapshots and draws.
        seed: Of the vocabulary rows that the discrepancy is measured to.
    """

    steps: list[int]
    measures: dict[str, Measure]
    num_draws: int
    bandwidth: float
    seed: int


def geometry_series(
    snapshots: Tensor,
    draws: Tensor,
    prior: Prior,
    vocabulary: Tensor,
    initial_prompt: Tensor | None = None,
    steps: Sequence[int] | None = None,
    draw_cosines: Tensor | None = None,
    num_rows: int = 1000,
    seed: int = 0,
    excluded: Ids | None = None,
    posterior: Tensor | None = None,
) -> GeometrySeries:
    """Every measure of a trajectory, with the prior's own expectation as a band.

    Args:
        snapshots: The prompt as training went on, shape `[T, P, d]`; one prompt is T = 1.
        draws: Prompts drawn from the same prior, shape `[n, P, d]`, n >= 2; 200 give a band that holds still. Their
            drift is measured from the initial prompt too: it is how far an unrelated prompt lies.
        prior: Of the prompt's layer.
        vocabulary: That layer's reference rows, shape `[V, d]`.
        initial_prompt: Where drift is measured from, shape `[P, d]`; the first snapshot if None.
        steps: Training step of each snapshot, 0 to T − 1 if None.
        draw_cosines: `best_scores(draws, vocabulary)` where it is known already; it is what costs most.
        num_rows: Vocabulary rows drawn for the discrepancy.
        seed: Of that draw.
        excluded: Ids of vocabulary rows that don't count.
        posterior: Prompts drawn from the posterior whose mean the last snapshot is, shape `[n, P, d]`.

    Raises:
        ValueError: Shapes don't belong together, or a tensor is empty or not finite.
    """
    snapshots = check_points("snapshots", snapshots, "[T, P, d]")
    draws = check_points("draws", draws, "[n, P, d]")
    vocabulary = check_points("vocabulary", vocabulary, "[V, d]")
    check_same_shape("draws[0]", draws[0], "snapshots[0]", snapshots[0])
    check_same_width("snapshots", snapshots, "vocabulary", vocabulary)
    check_at_least("the number of draws", len(draws), 2, "draw 200 for a band")
    start = snapshots[0] if initial_prompt is None else initial_prompt
    times = list(range(len(snapshots))) if steps is None else [int(step) for step in steps]
    if len(times) != len(snapshots):
        raise ValueError(f"steps must have one entry for each of the {len(snapshots)} snapshots, got {len(times)}")
    if draw_cosines is None:
        draw_cosines = best_scores(draws, vocabulary, excluded=excluded)
    elif draw_cosines.shape != draws.shape[:2]:
        raise ValueError(f"draw_cosines must have shape {list(draws.shape[:2])}, got {list(draw_cosines.shape)}")
    sample = vocabulary[sample_rows(len(vocabulary), num_rows, seed, excluded).to(vocabulary.device)]
    bandwidth = median_distance(sample)
    dim = snapshots.shape[-1]
    functions: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "effective_rank": ("directions", effective_rank),
        "mean_pairwise_cosine": ("cosine", mean_pairwise_cosine),
        "norm": ("length", lambda x: x.double().norm(dim=-1).mean(-1)),
        "norm_percentile": ("percent", lambda x: norm_percentile(x, vocabulary, excluded).mean(-1)),
        "radius": ("prior standard deviations", lambda x: mahalanobis_radius(x, prior).mean(-1)),
        "radius_chi_percentile": ("percent", lambda x: chi_percentile(mahalanobis_radius(x, prior), dim).mean(-1)),
        "drift": (
            "prior standard deviations",
            lambda x: token_drift(x, start, prior).square().mean(-1).sqrt(),
        ),
        "squared_mmd": ("squared kernel distance", lambda x: squared_mmd(x, sample, bandwidth)),
    }
    if snapshots.shape[1] == 1:
        del functions["mean_pairwise_cosine"], functions["squared_mmd"]
    functions["nearest_cosine"] = ("cosine", lambda x: best_scores(x, vocabulary, excluded=excluded).mean(-1))

    def measured(name: str, unit: str, measure: Callable[[Tensor], Tensor]) -> Measure:
        null = draw_cosines.mean(-1) if name == "nearest_cosine" else measure(draws)
        values, null = measure(snapshots).double().cpu(), null.double().cpu()
        return Measure(
            unit=unit,
            values=values,
            band=band(null),
            median=float(null.median()),
            percentile=percentile_among(values, null),
            posterior=None if posterior is None else band(measure(posterior).cpu()),
        )

    measures = {name: measured(name, *function) for name, function in functions.items()}
    return GeometrySeries(times, measures, len(draws), bandwidth, seed)
