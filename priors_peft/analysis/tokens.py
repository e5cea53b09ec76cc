"""Which vocabulary tokens a soft prompt lies near, and whether that is more than a random prompt would show."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..names import check_at_least, check_choice
from .common import (
    Ids,
    Result,
    band,
    check_points,
    check_same_shape,
    check_same_width,
    kept_rows,
    percentile_among,
)


METRICS = ("cosine", "l2", "dot")

# What is computed at a time, beside the inputs.
_CHUNK_BYTES = 2**28
_QUERIES = 4096
# Scores are compared in float32 while the vocabulary streams past and computed anew in float64 for so many more.
_SPARE = 16
# Scores this near are tied, relative to their size: a prior without spread must not win by rounding.
_TIED = 1e-6


@dataclass(frozen=True, eq=False)
class NearestTokens(Result):
    """The vocabulary rows nearest to each virtual token, nearest first.

    Attributes:
        ids: Token ids, shape `[P, k]`.
        scores: Cosine, dot product, or minus the Euclidean distance: higher is nearer. Shape `[P, k]`, float64.
        metric: `"cosine"`, `"l2"` or `"dot"`.
    """

    ids: Tensor
    scores: Tensor
    metric: str


def nearest_tokens(
    prompt: Tensor,
    vocabulary: Tensor,
    k: int = 10,
    metric: str = "cosine",
    excluded: Ids | None = None,
    chunk_size: int | None = None,
) -> NearestTokens:
    """The k nearest vocabulary rows of each virtual token, exact, the smaller id first among equals.

    Args:
        prompt: Virtual tokens in the embedding layer's space, shape `[P, d]`.
        vocabulary: Embeddings as the model looks them up, shape `[V, d]`.
        k: How many.
        metric: `"cosine"`, `"l2"` or `"dot"`.
        excluded: Ids of rows that don't count: special tokens, rows that were never trained.
        chunk_size: Vocabulary rows at a time; by default what takes 256 MiB. It does not change the result.

    Raises:
        ValueError: An argument is not valid, or the vocabulary has fewer than k rows left.
    """
    prompt = check_points("prompt", prompt, "[P, d]")
    count = len(prompt)
    check_at_least("k", k, 1)
    kept, chunks = _prepared(prompt, vocabulary, metric, excluded, chunk_size, "prompt")
    if k > len(kept):
        raise ValueError(f"k must be at most the {len(kept)} vocabulary rows that are not excluded, got {k}")
    best = torch.empty(count, 0, dtype=torch.int64)
    for start in range(0, count, _QUERIES):
        queries, found = prompt[start : start + _QUERIES], torch.empty(0, 0, dtype=torch.int64)
        for ids, scores in chunks(queries, torch.float64):
            # Score and id in one integer, so that what comes first never hangs on how the rows are cut into chunks.
            bits = (scores.float() + 0.0).view(torch.int32).long()
            keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) * 2**32 + (2**32 - 1 - ids)
            keys = torch.cat([found, keys], 1) if found.numel() else keys
            found = keys.topk(min(k + _SPARE, keys.shape[1])).values
        best = torch.cat([best.reshape(-1, found.shape[1]), found])
    ids = 2**32 - 1 - best.remainder(2**32)
    exact = _pairwise(prompt, vocabulary[ids.to(vocabulary.device)], metric).cpu()
    by_id = ids.argsort(stable=True)
    order = by_id.gather(1, exact.gather(1, by_id).argsort(descending=True, stable=True))[:, :k]
    return NearestTokens(ids.gather(1, order), exact.gather(1, order), metric)


def best_scores(
    prompts: Tensor,
    vocabulary: Tensor,
    metric: str = "cosine",
    excluded: Ids | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Score of each virtual token's nearest vocabulary row: of many prompts at once, for nulls and trajectories.

    Args:
        prompts: Shape `[..., P, d]`.
        vocabulary: Shape `[V, d]`.
        metric: As in `nearest_tokens`, like the other arguments.
        excluded: Ids of rows that don't count.
        chunk_size: Vocabulary rows at a time.

    Returns:
        Shape `[..., P]`, float64; higher is nearer.
    """
    return best_tokens(prompts, vocabulary, metric, excluded, chunk_size)[0]


def best_tokens(
    prompts: Tensor,
    vocabulary: Tensor,
    metric: str = "cosine",
    excluded: Ids | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`best_scores`, and the ids of those rows, int64 of the same shape; rows tied in float32 go to the smaller id."""
    prompts = check_points("prompts", prompts, "[..., P, d]")
    _, chunks = _prepared(prompts, vocabulary, metric, excluded, chunk_size, "prompts")
    flat = prompts.reshape(-1, prompts.shape[-1])
    best, ids_of_best = [], []
    for queries in flat.split(_QUERIES):
        highest, nearest = torch.full((len(queries),), -torch.inf), torch.zeros(len(queries), dtype=torch.long)
        # In float32, at half the price; the score of what is found is then computed in float64.
        for ids, scores in chunks(queries, torch.float32):
            found, index = scores.max(1)
            nearest = torch.where(found > highest, ids[index], nearest)
            highest = torch.maximum(highest, found)
        rows = vocabulary[nearest.to(vocabulary.device)][:, None]
        best.append(_pairwise(queries, rows, metric)[:, 0].cpu())
        ids_of_best.append(nearest)
    shape = prompts.shape[:-1]
    return torch.cat(best).reshape(shape), torch.cat(ids_of_best).reshape(shape)


def _prepared(
    prompt: Tensor, vocabulary: Tensor, metric: str, excluded: Ids | None, chunk_size: int | None, name: str
) -> tuple[Tensor, Callable[[Tensor, torch.dtype], Iterator[tuple[Tensor, Tensor]]]]:
    """Ids of the rows that count, and a generator of (ids, scores `[Q, c]`) over chunks of them."""
    check_choice("metric", metric, METRICS)
    vocabulary = check_points("vocabulary", vocabulary, "[V, d]")
    check_same_width(name, prompt, "vocabulary", vocabulary)
    kept = kept_rows(len(vocabulary), excluded)
    if chunk_size is not None:
        check_at_least("chunk_size", chunk_size, 1)

    def chunks(queries: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
        queries = _scaled(queries.to(dtype), metric)
        size = chunk_size or max(1, _CHUNK_BYTES // (24 * queries.shape[1] + 40 * len(queries)))
        for ids in kept.split(size):
            contiguous = int(ids[-1]) - int(ids[0]) + 1 == len(ids)
            rows = vocabulary[int(ids[0]) : int(ids[-1]) + 1] if contiguous else vocabulary[ids.to(vocabulary.device)]
            rows = _scaled(rows.to(dtype), metric)
            scores = queries.to(rows.device) @ rows.mT
            if metric == "l2":
                # Orders rows as minus the distance does.
                scores -= rows.square().sum(-1) / 2
            yield ids, scores.cpu()

    return kept, chunks


def _scaled(rows: Tensor, metric: str) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-30) if metric == "cosine" else rows


def _pairwise(prompt: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Scores of virtual tokens `[P, d]` against rows of their own `[P, n, d]`, each computed alone."""
    queries = prompt.to(rows.device).double()[:, None]
    if metric == "l2":
        return -(queries - rows.double()).square().sum(-1).sqrt()
    return (_scaled(queries, metric) * _scaled(rows.double(), metric)).sum(-1)


@dataclass(frozen=True, eq=False)
class TokenSignal(Result):
    """How near each virtual token lies to the vocabulary, against what chance, start and prior explain.

    Attributes:
        scores: Score of the nearest token, shape `[P]`.
        prior_percentile: Percent of the prior's draws whose same virtual token scores lower, shape `[P]`.
        prior_band: 5th and 95th percentile of the draws' scores, shape `[2, P]`.
        p_values: Against the prior, corrected for the P tokens looked at, shape `[P]`.
        initial_percentile: Percent of the initial prompt's virtual tokens that score lower, shape `[P]`, or None.
        inherited: The nearest token was so at the start already, or is so at the prior's own centre, and is no nearer
            now; shape `[P]`.
        signal: `p_values <= level` and not inherited, shape `[P]`.
        level: Chance that a prompt drawn from the prior shows any signal.
        num_draws: Prompts drawn from the prior.
        metric: Of the scores.
    """

    scores: Tensor
    prior_percentile: Tensor
    prior_band: Tensor
    p_values: Tensor
    initial_percentile: Tensor | None
    inherited: Tensor
    signal: Tensor
    level: float
    num_draws: int
    metric: str


def token_signal(
    nearest: NearestTokens,
    draw_scores: Tensor,
    initial: NearestTokens | None = None,
    level: float = 0.05,
    centre: NearestTokens | None = None,
) -> TokenSignal:
    """Which virtual tokens lie nearer to their nearest token than random prompts, start and prior explain.

    Scores are standardized for each virtual token over the draws and the prompt together, as virtual tokens may have
    locations of their own, and compared with the *highest* of each draw (Westfall & Young 1993, single-step maxT).
    A prompt drawn from the prior is exchangeable with the draws, so it shows signal anywhere with probability
    `level` at most, and exactly that where `level * (num_draws + 1)` is a whole number and scores are continuous. A
    Bonferroni correction would need 20 times the draws for 20 tokens to show anything at all.

    A token counts as inherited, not as signal, where training left it no nearer than the initial prompt had it: a
    start from text lies on the vocabulary whatever training did. So does one that the prior's own centre is nearest
    to, no farther: draws scatter about the centre, and training under MAP pulls a prompt nearer to it than they are.

    Args:
        nearest: Of the prompt.
        draw_scores: `best_scores` of prompts drawn from the same prior, same metric and exclusions, shape `[n, P]`.
        initial: Of the initial prompt, in the same metric.
        level: Of signal, in (0, 1).
        centre: Of the prior's location at each virtual token, in the same metric.

    Raises:
        ValueError: There are too few draws to show signal at this level, or the arguments don't belong together.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")
    draws = check_points("draw_scores", draw_scores, "[n, P]").double()
    scores = nearest.scores[:, 0].double()
    if draws.shape[1] != len(scores):
        raise ValueError(
            f"draw_scores must have one column for each of the {len(scores)} virtual tokens, got {draws.shape[1]}: "
            "draw prompts of the same length"
        )
    count = len(draws)
    needed = math.ceil(1 / level - 1e-9) - 1
    if count < needed:
        raise ValueError(
            f"draw_scores must hold at least {needed} draws to show signal at level {level}, got {count}: draw more"
        )
    together = torch.cat([draws, scores[None]])
    centred = together - together.mean(0)
    floor = _TIED * together.abs().mean(0).clamp_min(torch.finfo(torch.float64).tiny)
    z = centred / torch.maximum(centred.square().mean(0).sqrt(), floor)
    highest = z[:-1].amax(1)
    p_values = (1 + (highest[:, None] >= z[-1] - _TIED).sum(0)) / (count + 1)
    signal = p_values <= level + 1e-12
    initial_percentile, inherited = None, torch.zeros_like(signal)
    for name, given in (("initial", initial), ("centre", centre)):
        if given is None:
            continue
        if given.metric != nearest.metric:
            raise ValueError(f"{name} must be in the metric {nearest.metric!r} of nearest, got {given.metric!r}")
        check_same_shape(f"{name}.scores[:, 0]", given.scores[:, 0], "nearest.scores[:, 0]", scores)
        before = given.scores[:, 0].double()
        tolerance = _TIED * float(before.abs().mean())
        if given is initial:
            initial_percentile = percentile_among(scores, before, tolerance)
        inherited |= (given.ids[:, 0] == nearest.ids[:, 0]) & (scores <= before + tolerance)
    return TokenSignal(
        scores=scores,
        prior_percentile=percentile_among(scores, draws, _TIED * float(draws.abs().mean())),
        prior_band=band(draws),
        p_values=p_values,
        initial_percentile=initial_percentile,
        inherited=inherited,
        signal=signal & ~inherited,
        level=level,
        num_draws=count,
        metric=nearest.metric,
    )


@dataclass(frozen=True, eq=False)
class TokenChanges(Result):
    """What training did to the lists of nearest tokens.

    Attributes:
        kept: For each virtual token the ids in both its lists, in the final one's order.
        gained: The ids in its final list only.
        lost: The ids in its initial list only, in that one's order.
        moved: Whether its nearest token is another one now, shape `[P]`.
        kept_anywhere: Ids in both prompts' lists, at whichever virtual tokens, ascending.
    """

    kept: list[list[int]]
    gained: list[list[int]]
    lost: list[list[int]]
    moved: Tensor
    kept_anywhere: list[int]


def token_changes(initial: NearestTokens, final: NearestTokens) -> TokenChanges:
    """Tokens that stayed through training and tokens that moved, by the lists of nearest tokens before and after."""
    check_same_shape("initial.ids", initial.ids, "final.ids", final.ids)
    if initial.metric != final.metric:
        raise ValueError(f"initial must be in the metric {final.metric!r} of final, got {initial.metric!r}")
    pairs = list(zip(initial.ids.tolist(), final.ids.tolist(), strict=True))
    return TokenChanges(
        kept=[[token for token in after if token in before] for before, after in pairs],
        gained=[[token for token in after if token not in before] for before, after in pairs],
        lost=[[token for token in before if token not in after] for before, after in pairs],
        moved=initial.ids[:, 0] != final.ids[:, 0],
        kept_anywhere=sorted(set(initial.ids.flatten().tolist()) & set(final.ids.flatten().tolist())),
    )
