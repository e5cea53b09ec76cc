"""Several adapters side by side: how stable runs of a task are, and which words they say too often."""

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .common import Ids
from .members import Member, Space, draw
from .stability import barrier, equidistance, metric_spread, prompt_distances
from .tokens import nearest_tokens
from .words import count_words, over_represented, token_text


if TYPE_CHECKING:
    from .on_tasks import OnTasks

# Straight lines between runs cost 11 measurements each: all pairs of 4 runs; of more, each with the next.
MOST_PAIRS = 6
WORDS = 50
BACKGROUND_DRAWS = 20


def stability(
    members: Sequence[Member], on_tasks: "OnTasks | None", seed: int, left_out: dict[str, str]
) -> dict[str, Any] | None:
    """Distances between runs of a task, and with data the spread of their losses and the lines between them.

    Args:
        members: The adapters; those of one task, and of prompts of one shape at the same layers, are runs of it.
        on_tasks: What measures losses, or None.
        seed: Of the random prompts that equidistance is held against.
        left_out: Gets the reason where there are no two runs.
    """
    groups: dict[tuple, list[int]] = {}
    for index, member in enumerate(members):
        task = json.dumps([member.trained_on.get(key) for key in ("task", "task_kwargs")], sort_keys=True)
        key = (task, tuple(member.source.layers), tuple(member.source.prompt.shape))
        groups.setdefault(key, []).append(index)
    runs = [group for _, group in sorted(groups.items()) if len(group) > 1]
    if not runs:
        several = "they differ in task, layers or number of virtual tokens" if len(members) > 1 else "one was given"
        left_out["stability"] = f"it needs two adapters of one task and shape, and {several}"
        return None
    return {"groups": [_group([members[index] for index in group], group, on_tasks, seed) for group in runs]}


def _group(runs: list[Member], indices: list[int], on_tasks: "OnTasks | None", seed: int) -> dict[str, Any]:
    prompts = torch.stack([_by_token(member.source.prompt) for member in runs])
    distances = prompt_distances(prompts)
    found: dict[str, Any] = {
        "task": runs[0].task,
        "adapters": [member.source.name for member in runs],
        "raw_distances": distances.raw,
        "matched_distances": distances.matched,
        "equidistance": None,
        "metric_spread": None,
        "lines": [],
        "left_out_pairs": 0,
    }
    if len(runs) > 2:
        found["equidistance"] = equidistance(prompts, _random_groups(runs, seed), matched=True)
    if on_tasks is not None:
        losses = [on_tasks.nll(index) for index in indices]
        found["metric_spread"] = metric_spread(losses).to_dict() | {"metric": "nll"}
        pairs = list(itertools.combinations(range(len(runs)), 2))
        if len(pairs) > MOST_PAIRS:
            found["left_out_pairs"] = len(pairs) - len(runs)
            pairs = [(index, (index + 1) % len(runs)) for index in range(len(runs))]
        for one, other in pairs:
            nlls = on_tasks.line(indices[one], indices[other])
            found["lines"].append(
                {
                    "pair": [runs[one].source.name, runs[other].source.name],
                    "t": torch.linspace(0, 1, len(nlls), dtype=torch.float64),
                    "nll": nlls,
                    "barrier": barrier(nlls),
                }
            )
    return found


def _by_token(prompt: Tensor) -> Tensor:
    """A virtual token's vectors of all layers side by side: `[S, P, d]` to `[P, S d]`."""
    return prompt.transpose(-3, -2).flatten(-2)


def _random_groups(runs: list[Member], seed: int) -> Tensor:
    """Groups of random prompts, one from each run's own prior: `[n, P, S d]`, run after run within a group."""
    groups = max(20, len(runs[0].nulls[0].draws) // len(runs))
    of_runs = []
    for place, member in enumerate(runs):
        count = member.source.prompt.shape[1]
        layers = zip(member.source.layers, member.priors, strict=True)
        draws = [draw(prior, groups, count, "runs", place, layer, seed) for layer, prior in layers]
        of_runs.append(_by_token(torch.stack(draws, dim=1)))
    return torch.stack(of_runs, dim=1).flatten(0, 1)


def word_odds(
    members: Sequence[Member], space: Space, tokenizer: Any, k: int, metric: str, left_out: dict[str, str]
) -> dict[str, Any] | None:
    """Words near more of the prompts than of random prompts from their priors, the most over-represented first."""
    if len(members) < 2:
        left_out["words"] = "it needs two adapters, and one was given"
        return None

    def words(ids: Ids) -> list[str]:
        return [token_text(tokenizer, int(token)) for token in torch.as_tensor(ids).flatten()]

    nulls = {id(member.nulls[0]): member.nulls[0] for member in members}
    each = max(1, BACKGROUND_DRAWS // len(nulls))
    background = [one for null in nulls.values() for one in null.draws[:each]]
    near = [nearest_tokens(one, space.vectors, k, metric, space.excluded).ids for one in background]
    counts = count_words([words(member.near.ids) for member in members])
    found = over_represented(counts, count_words([words(ids) for ids in near])).to_dict()
    cut = {name: values[:WORDS] if isinstance(values, list) else values for name, values in found.items()}
    return cut | {"total": len(found["words"]), "num_prompts": len(members), "num_draws": len(background)}
