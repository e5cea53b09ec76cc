"""Prompts on tasks they were not trained on: what a transfer matrix says, and which similarity foretells it."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..names import check_at_least
from .common import Result, check_points
from .stability import prompt_distances


@dataclass(frozen=True, eq=False)
class TransferSummary(Result):
    """What a transfer matrix says.

    Attributes:
        share: Of transfers (a prompt on a task it was not trained on) that beat no prompt, 0 to 1; ties don't beat.
        wins: Their number.
        transfers: Number of transfers.
        own_share: Of prompts that beat no prompt on their own task; nan where none is there.
        gain_over_none: What each prompt adds to no prompt on each task, better is positive; shape `[N, M]`.
        gain_over_own: The same over the mean of the task's own prompts, nan where it has none; shape `[N, M]`.
        own: Column of each prompt's own task, None where it is none of them.
    """

    share: float
    wins: int
    transfers: int
    own_share: float
    gain_over_none: Tensor
    gain_over_own: Tensor
    own: list[int | None]


def transfer_summary(
    scores: Tensor, no_prompt: Tensor, own: Sequence[int | None] | None = None, higher_is_better: bool = True
) -> TransferSummary:
    """The share of transfers that beat no prompt, and gains over no prompt and over the task's own prompts.

    Args:
        scores: Of each prompt on each task, shape `[N, M]`.
        no_prompt: Score of each task without a prompt, shape `[M]`.
        own: Column of the task each prompt was trained on, so that a task can have several prompts (seeds), or
            None for another task, of which all are then transfers; the diagonal if None, which needs N = M.
        higher_is_better: False for losses.

    Raises:
        ValueError: Shapes don't belong together, a score is not finite, or there is no transfer.
    """
    scores, no_prompt = check_points("scores", scores, "[N, M]"), check_points("no_prompt", no_prompt, "[M]")
    if len(no_prompt) != scores.shape[1]:
        raise ValueError(
            f"no_prompt must have a score for each of the {scores.shape[1]} tasks of scores, got {len(no_prompt)}"
        )
    columns = _own(own, *scores.shape)
    sign = 1.0 if higher_is_better else -1.0
    values = sign * scores.double().cpu()
    over_none = values - sign * no_prompt.double().cpu()
    is_own = columns[:, None] == torch.arange(scores.shape[1])
    if is_own.all():
        raise ValueError("scores must hold at least one task that a prompt was not trained on, got none: add tasks")
    count = is_own.sum(0)
    means = torch.where(is_own, values, 0).sum(0) / count  # nan where a task has no prompt of its own
    beats = over_none > 0
    wins, transfers = int(beats[~is_own].sum()), int((~is_own).sum())
    return TransferSummary(
        share=wins / transfers,
        wins=wins,
        transfers=transfers,
        own_share=float(beats[is_own].double().mean()),
        gain_over_none=over_none,
        gain_over_own=values - means,
        own=[None if column < 0 else column for column in columns.tolist()],
    )


def _own(own: Sequence[int | None] | None, prompts: int, tasks: int) -> Tensor:
    if own is None:
        if prompts != tasks:
            raise ValueError(
                f"own must say which of the {tasks} tasks each of the {prompts} prompts was trained on, got None: only "
                "of a square matrix is it the diagonal"
            )
        return torch.arange(prompts)
    listed = own.tolist() if isinstance(own, Tensor) else list(own)
    if len(listed) != prompts or not all(column is None or 0 <= column < tasks for column in listed):
        raise ValueError(
            f"own must hold {prompts} columns between 0 and {tasks - 1}, one for each prompt, or None for a task that "
            f"is not there, got {listed}"
        )
    return torch.tensor([-1 if column is None else int(column) for column in listed])


# Similarities between prompts, higher is more alike.


def prompt_similarities(prompts: Tensor) -> dict[str, Tensor]:
    """Similarities between prompts that look at the prompts alone.

    Args:
        prompts: Shape `[N, P, d]` with N >= 2.

    Returns:
        `"frobenius"`: minus the norm of the difference. `"cosine"`: mean cosine over all pairs of their virtual
        tokens, whatever their order. `"matched"`: minus the norm of the difference after optimal matching of virtual
        tokens. Each `[N, N]`.
    """
    distances = prompt_distances(prompts)
    unit = torch.nn.functional.normalize(prompts.detach().double().cpu(), dim=-1).mean(1)
    return {"frobenius": -distances.raw, "cosine": unit @ unit.mT, "matched": -distances.matched}


def activation_overlap(active: Tensor) -> Tensor:
    """Overlap of the feed-forward neurons that prompts activate: the cosine of their boolean patterns, `[N, N]`.

    The overlapping rate of activated neurons of Su et al. (2022), "On Transferability of Prompt Tuning for Natural
    Language Processing", as `ActivatedNeurons` in `caculate_metric_value_for_correlation.py` of their code
    (github.com/thunlp/Prompt-Transferability) has it: 1 where an activation is above 0, and the cosine of that; which
    is shared neurons over the geometric mean of both prompts' numbers of active ones. They look at three layers at a
    time and at all, we at all. It is 0 where a prompt activates none.

    Args:
        active: Which neurons each prompt activates, over all layers looked at; boolean, shape `[N, ...]`.

    Raises:
        ValueError: It is not boolean, there are fewer than 2 prompts, or no neurons.
    """
    if not isinstance(active, Tensor) or active.dtype != torch.bool or active.ndim < 2 or active.numel() == 0:
        got = f"{active.dtype} {list(active.shape)}" if isinstance(active, Tensor) else type(active).__name__
        raise ValueError(
            f"active must be a boolean tensor of shape [N, ...] that is not empty, got {got}: pass activations > 0"
        )
    check_at_least("the number of prompts", len(active), 2, "an overlap is between two")
    patterns = active.flatten(1).double().cpu()
    sizes = patterns.sum(1)
    return patterns @ patterns.mT / (sizes[:, None] * sizes).sqrt().clamp_min(1)


# Does a similarity foretell transfer?


@dataclass(frozen=True, eq=False)
class TransferCorrelation(Result):
    """Rank correlation of a similarity with transfer.

    Attributes:
        rho: Spearman's, over pairs of prompts of different tasks; nan where one side does not vary.
        p_value: Two-sided, over relabelled prompts.
        interval: 95 % bootstrap interval over tasks, shape `[2]`.
        num_pairs: Ordered pairs of prompts.
        num_permutations: Relabellings looked at.
        exact: Whether those are all there are.
        num_resamples: Bootstrap samples in which a correlation exists.
        seed: Of relabellings and samples.
    """

    rho: float
    p_value: float
    interval: Tensor
    num_pairs: int
    num_permutations: int
    exact: bool
    num_resamples: int
    seed: int


def transfer_correlation(
    similarity: Tensor,
    transfer: Tensor,
    own: Sequence[int | None] | None = None,
    num_permutations: int = 10_000,
    num_resamples: int = 1000,
    seed: int = 0,
) -> TransferCorrelation:
    """Spearman correlation of the prompts' similarity with how well each does on the other's task.

    Pairs share prompts, so they are not independent, and neither test treats them so. The p-value is Mantel's (1967):
    the prompts of the similarity matrix are relabelled, rows and columns together. Several prompts of a task (seeds)
    are relabelled as a block, and among themselves: they repeat each other, and would else count as evidence of their
    own. Where all relabellings are few enough they are all looked at; with 3 tasks p can't go below 1/6, with 4 below
    1/24. The interval is the percentile bootstrap over tasks with all their prompts (Snijders & Borgatti 1999); a pair
    of copies of one task is left out.

    Args:
        similarity: Between prompts, higher is more alike, shape `[N, N]`; its diagonal is not looked at.
        transfer: Of each prompt on each task, shape `[N, M]`, better is higher. Pass gains over no prompt
            (`TransferSummary.gain_over_none`), as raw scores differ between tasks for reasons of their own.
        own: As in `transfer_summary`.
        num_permutations: Most relabellings to look at.
        num_resamples: Bootstrap samples.
        seed: Of both.

    Raises:
        ValueError: Shapes don't belong together, there are fewer than 3 tasks with prompts, or they have different
            numbers of prompts.
    """
    transfer = check_points("transfer", transfer, "[N, M]")
    similarity = check_points("similarity", similarity, "[N, N]")
    count = len(transfer)
    if similarity.shape != (count, count):
        raise ValueError(
            f"similarity must have shape [{count}, {count}] for the {count} prompts of transfer, got "
            f"{list(similarity.shape)}"
        )
    check_at_least("num_permutations", num_permutations, 1)
    check_at_least("num_resamples", num_resamples, 1)
    columns = _own(own, *transfer.shape).numpy()
    if (columns < 0).any():
        raise ValueError(
            f"own must name a task of transfer for every prompt, got None for {int((columns < 0).sum())}: without it "
            "there is no prompt to be similar to; add their tasks or leave them out"
        )
    blocks = [np.flatnonzero(columns == task) for task in np.unique(columns)]
    check_at_least("the number of tasks with prompts", len(blocks), 3, "two tasks have one similarity")
    if len({len(block) for block in blocks}) > 1:
        raise ValueError(
            f"own must name each task as often, got {[len(block) for block in blocks]} prompts: leave some runs out"
        )
    alike = similarity.double().cpu().numpy()
    done = transfer.double().cpu().numpy()[:, columns]
    different = columns[:, None] != columns
    rho = _spearman(alike[different], done[different])

    # Relabelling blocks carries pairs of different tasks to such pairs, so that ranks need no second look.
    ranks = np.zeros_like(alike)
    ranks[different] = _ranks(alike[different])
    fixed = _ranks(done[different])
    exact = len(blocks) == count and math.factorial(count) <= num_permutations
    generator = np.random.default_rng(seed)
    labels = itertools.permutations(range(count)) if exact else _relabellings(blocks, num_permutations, generator)
    null = np.array([np.dot(ranks[np.ix_(label, label)][different], fixed) for label in map(list, labels)])
    beyond = int((np.abs(null) >= abs(np.dot(ranks[different], fixed)) - 1e-9).sum())
    p_value = beyond / len(null) if exact else (1 + beyond) / (1 + len(null))

    samples = []
    for _ in range(num_resamples):
        chosen = np.concatenate([blocks[index] for index in generator.integers(len(blocks), size=len(blocks))])
        pairs = columns[chosen][:, None] != columns[chosen]
        grid = np.ix_(chosen, chosen)
        samples.append(_spearman(alike[grid][pairs], done[grid][pairs]))
    found = np.array(samples)[np.isfinite(samples)]
    interval = np.quantile(found, [0.025, 0.975]) if len(found) else np.full(2, np.nan)
    return TransferCorrelation(
        rho=rho,
        p_value=p_value if math.isfinite(rho) else math.nan,
        interval=torch.from_numpy(interval),
        num_pairs=int(different.sum()),
        num_permutations=len(null),
        exact=exact,
        num_resamples=len(found),
        seed=seed,
    )


def _relabellings(blocks: list[np.ndarray], count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Random relabellings of prompts: tasks among themselves, and each task's prompts among themselves."""
    for _ in range(count):
        label = np.empty(sum(map(len, blocks)), dtype=np.int64)
        for block, source in zip(blocks, generator.permutation(len(blocks)), strict=True):
            label[block] = generator.permutation(blocks[source])
        yield label


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties shared, centred and of length 1, so that a dot product is a correlation; zeros if all are equal."""
    from scipy.stats import rankdata

    # Distances that should be equal differ in their last bits.
    ranks = rankdata(np.round(values / max(np.abs(values).max(), np.finfo(float).tiny), 12))
    centred = ranks - ranks.mean()
    return centred / max(float(np.linalg.norm(centred)), np.finfo(float).tiny)


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    if not len(first):
        return math.nan
    one, other = _ranks(first), _ranks(second)
    return float(np.dot(one, other)) if one.any() and other.any() else math.nan
