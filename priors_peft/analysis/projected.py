"""What is projected into a plane together: prompts, their starts and courses, vocabulary, random prompts, data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .common import sample_rows
from .members import Member, Space
from .projection import Projection, pca, tsne, umap
from .words import show_token


# Enough to show the vocabulary's shape; t-SNE takes 5 s for 1,560 points on a core, and a report must stay small.
VOCABULARY_POINTS = 500
DATA_POINTS = 200
PRIOR_DRAWS = 5
POSTERIOR_DRAWS = 12
TRAJECTORY_POINTS = 1000
MOST_SNAPSHOTS = 9
# Coordinates are for pictures.
_DIGITS = 5


def project(
    members: Sequence[Member],
    space: Space,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    seed: int,
    with_umap: bool = False,
) -> dict[str, Any]:
    """PCA, t-SNE and maybe UMAP of the embedding layer's prompts with what surrounds them, as analysis.json has them.

    Args:
        members: The adapters.
        space: The embedding layer's.
        tokenizer: The base model's.
        tasks: Rows by task, whose tokens are shown.
        seed: Of samples, of t-SNE and of UMAP.
        with_umap: Whether to add it.
    """
    vectors = space.vectors
    shown: list[tuple[dict[str, Any], Tensor]] = []

    def add(name: str, kind: str, points: Tensor, labels: list[str], steps: list[int | None] | None = None) -> None:
        shown.append(({"name": name, "kind": kind, "labels": labels, "steps": steps}, points.detach().float().cpu()))

    def add_tokens(name: str, kind: str, ids: Tensor) -> None:
        add(name, kind, vectors[ids.to(vectors.device)], [show_token(tokenizer, int(token)) for token in ids])

    add_tokens("vocabulary", "vocabulary", sample_rows(len(vectors), VOCABULARY_POINTS, seed, space.excluded))
    for task, rows in tasks.items():
        add_tokens(task, "activations", _tokens_of(rows, tokenizer, space, seed))
    nulls = {id(member.nulls[0]): member.nulls[0] for member in members}
    each = max(1, PRIOR_DRAWS // len(nulls))
    draws = torch.cat([null.draws[:each].flatten(0, 1) for null in list(nulls.values())[:PRIOR_DRAWS]])
    add("draws from the prior", "draws", draws, ["draw"] * len(draws))
    for member in members:
        source, count = member.source, len(member.near.ids)
        labels = [f"{index}: {show_token(tokenizer, int(ids[0]))}" for index, ids in enumerate(member.near.ids)]
        if source.initial is not None:
            add(source.name, "initial", source.initial[0], labels)
        most = max(2, min(MOST_SNAPSHOTS, TRAJECTORY_POINTS // (len(members) * count)))
        if len(source.steps) > 1:
            chosen = torch.linspace(0, len(source.steps) - 1, most).round().long().unique().tolist()
            steps = [source.steps[index] for index in chosen for _ in range(count)]
            add(source.name, "trajectory", source.trajectory[chosen, 0].flatten(0, 1), labels * len(chosen), steps)
        if member.drawn is not None:
            own = member.drawn[: min(PRIOR_DRAWS, max(1, POSTERIOR_DRAWS // len(members))), 0]
            add(source.name, "posterior", own.flatten(0, 1), labels * len(own))
        add(source.name, "prompt", source.prompt[0], labels)
    return _planes(shown, seed, with_umap)


def _planes(shown: list[tuple[dict[str, Any], Tensor]], seed: int, with_umap: bool) -> dict[str, Any]:
    groups = {str(index): points for index, (_, points) in enumerate(shown)}
    total, width = sum(map(len, groups.values())), groups["0"].shape[1]
    facts = [fact for fact, _ in shown]
    planes: dict[str, Any] = {"layer": 0, "pca": None, "tsne": None, "umap": None}
    if min(total - 1, width) >= 2:
        found = pca(groups)
        planes["pca"] = {"explained_variance": found.explained_variance, "groups": _placed(facts, found)}
    if total >= 4:
        found = tsne(groups, seed=seed)
        planes["tsne"] = found.settings | {"groups": _placed(facts, found)}
        if with_umap:
            found = umap(groups, seed=seed)
            planes["umap"] = found.settings | {"groups": _placed(facts, found)}
    return planes


def _placed(facts: list[dict[str, Any]], found: Projection) -> list[dict[str, Any]]:
    return [fact | {"points": rounded(found.points[str(index)])} for index, fact in enumerate(facts)]


def rounded(points: Tensor) -> list[list[float]]:
    """Coordinates with as many digits as a picture shows."""
    return [[float(f"{value:.{_DIGITS}g}") for value in point] for point in points.tolist()]


def _tokens_of(rows: Any, tokenizer: Any, space: Space, seed: int) -> Tensor:
    """Ids of some of the ordinary tokens that occur in rows, ascending."""
    texts = [row["prompt"] + row["completion"] for row in rows]
    seen = torch.zeros(len(space.vectors), dtype=torch.bool)
    seen[torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])] = True
    if space.excluded is not None and not seen[space.excluded].all():
        kept = seen.clone()
        kept[space.excluded] = False
        seen = kept if kept.any() else seen
    return sample_rows(len(seen), DATA_POINTS, seed, (~seen).nonzero().squeeze(-1))
