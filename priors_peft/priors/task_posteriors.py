"""What prompts of several tasks have in common, where each is known by its posterior and not as a point."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Prior
from .low_rank import PSEUDO_ROWS, low_rank_root, principal_factors


_STEPS = 200
_TOLERANCE = 1e-3
# A point is known this well, in variances of the prior it was trained under.
_POINT = 1e-6


@dataclass
class TaskPosteriors:
    r"""Posteriors q_k(θ) over the prompts of K tasks at one layer, and the law of the tasks that they tell of.

    Each q_k ∝ L_k(θ) p_k(θ) was found under a training prior p_k, so it holds the data's word L_k and p_k's. Prompts as
    points, the q_k's means, spread too little about their mean: where the data say little all lie at p_k's location.
    The mixture of the q_k, with second moment E[θθᵀ] = mean_k(V_k + m_k m_kᵀ), is right only if p_k was the law of the
    tasks already, and else stays near p_k however many tasks there are. So p_k is divided out,

        λ_k = 1/v_k − 1/r_k,    h_k = m_k/v_k − o_k/r_k,

    with q_k = N(m_k, v_k) and p_k = N(o_k, r_k), and the normal–normal model of the tasks

        θ_k | µ ~ N(µ, τ²),    µ ~ N(o, r/2),    L_k(θ) ∝ exp(h_k θ − λ_k θ²/2)

    is fitted by the evidence (expectation–maximization for τ²; Dempster, Laird & Rubin, 1977; Morris, 1983), in
    whitened coordinates, where coordinates of prompts and of mean-field posteriors are about independent. τ² starts at
    r/2: what no data speak of keeps the training prior, half of its variance shared by the tasks and half their own. τ²
    of single coordinates is drawn towards their mean as if ten more prompts had shown it, and is at most the mixture's,
    so that a posterior that had not converged can't blow it up. A cold posterior's data count as it counted them.

    Args:
        priors: p_k, K of them.
        prompts: Means of the q_k, shape `[K, P, d]`.
        variance: Of the q_k in each one's own whitened coordinates, shape `[K, P, d]`; 0 for a point.
    """

    priors: Sequence[Prior]
    prompts: Tensor
    variance: Tensor

    def fit(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean `[P, d]` of the next task's prompt, and the root of its covariance: scale, directions and stretch."""
        known = next((k for k, one in enumerate(self.variance) if one.any()), 0)
        base = self.priors[known]
        means, variances, places, widths = (torch.stack(part) for part in zip(*self._common(base), strict=True))
        mean, rows, rest = between_tasks(means, variances, places, widths)
        deviations = _image(base, rows.flatten(0, 1))
        others = _image(base, torch.diag((len(deviations) * rest).sqrt()))
        factors = principal_factors(torch.cat([deviations, others]), rank, len(deviations))
        return base.to_prompt(mean.float()), *low_rank_root(*factors)

    def _common(self, base: Prior) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Mean and variance of each q_k and of its p_k in the whitened coordinates of one prior, all `[P, d]`."""
        found = []
        for prior, prompt, variance in zip(self.priors, self.prompts, self.variance.double(), strict=True):
            mean, place, width = base.to_whitened(prompt).double(), torch.zeros_like(variance), torch.ones(base.dim)
            if not _same(prior, base):
                place = base.to_whitened(prior.loc.expand_as(prompt)).double()
                squares = _whitened(base, _image(prior, torch.eye(base.dim))).square()
                variance, width = variance @ squares, squares.sum(0)
            found.append((mean, variance, place, width.double().expand_as(mean)))
        return found


def between_tasks(means: Tensor, variances: Tensor, places: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The law of the tasks in common coordinates, as `TaskPosteriors` has it; arguments of shape `[K, P, d]`, float64.

    Args:
        means: m_k.
        variances: v_k.
        places: o_k.
        widths: r_k.

    Returns:
        Mean of the next task's prompt `[P, d]`, and its covariance in two parts: rows `[K, P, d]` whose mean outer product
        is one, and variances `[d]` of what is independent from coordinate to coordinate.
    """
    variances = torch.maximum(variances, _POINT * widths)
    precision = (1 / variances - 1 / widths).clamp_min(0)
    pull = torch.where(precision > 0, means / variances - places / widths, 0.0)
    place, width = places.mean(0), widths.mean((0, 1))
    count = means[..., 0].numel()
    mixture = variances.mean((0, 1)) + means.var(0).mean(0)
    tau = width / 2
    for _ in range(_STEPS):
        known = 1 + precision * tau
        certainty = 2 / width + (precision / known).sum(0)
        mean, doubt = (2 * place / width + (pull / known).sum(0)) / certainty, 1 / certainty
        shrunk = tau / known  # variance of θ_k where µ is known
        rows = shrunk * (pull - precision * mean)
        rest = (shrunk + (precision * shrunk).square() * doubt).mean((0, 1))
        found = rows.square().mean((0, 1)) + rest
        before = tau
        tau = torch.minimum((count * found + PSEUDO_ROWS * found.mean()) / (count + PSEUDO_ROWS), mixture)
        if ((tau - before).abs() <= _TOLERANCE * before).all():
            break
    share = tau / found
    return mean, rows * share.sqrt(), rest * share + doubt.mean(0)


def _folded(prior: Prior, rows: Tensor) -> Tensor:
    """Rows `[n, d]` as prompts of as many virtual tokens as the prior has places for, zeros filling the last."""
    tokens = len(prior.loc) if prior.loc.ndim == 2 else 1
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % tokens)).view(-1, tokens, rows.shape[1])


def _image(prior: Prior, rows: Tensor) -> Tensor:
    """A z for rows z `[n, d]`, in float64."""
    return (prior.to_prompt(_folded(prior, rows.float())) - prior.loc).double().flatten(0, 1)[: len(rows)]


def _whitened(prior: Prior, rows: Tensor) -> Tensor:
    """A⁻¹x for rows x `[n, d]`, in float64."""
    return prior.to_whitened(_folded(prior, rows.float()) + prior.loc).double().flatten(0, 1)[: len(rows)]


def _same(one: Prior, other: Prior) -> bool:
    states = one.state_dict(), other.state_dict()
    return (
        type(one) is type(other)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    )
