"""Adapters under analysis, the spaces that their prompts lie in, and what random prompts look like there."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..priors import Prior
from ..priors.reference import vocabulary_ids, vocabulary_reference
from .sources import Source
from .tokens import NearestTokens, best_tokens


# Virtual tokens looked up at once, so that a bar can move.
_QUERIES = 1024


@dataclass
class Space:
    """Where a layer's prompts lie.

    Attributes:
        vectors: The layer's reference: the embeddings of all tokens, or states of random tokens; shape `[V, d]`.
        excluded: Ids of rows that don't count.
    """

    vectors: Tensor
    excluded: Tensor | None = None


@dataclass
class Null:
    """What random prompts from a prior look like.

    Attributes:
        draws: Shape `[n, P, d]`.
        scores: Of each virtual token's nearest reference row in the analysis' metric, shape `[n, P]`.
        cosines: The same in cosine.
        nearest: Ids of the rows that `scores` are of, shape `[n, P]`.
    """

    draws: Tensor
    scores: Tensor
    cosines: Tensor
    nearest: Tensor


@dataclass
class Member:
    """One adapter with what was found for it on the way.

    Attributes:
        source: The adapter.
        priors: One for each layer.
        nulls: One for each layer.
        near: Nearest tokens of the embedding layer's prompt.
        trained_on: What it says of its own task, see `hub.adapter.read_task`; empty where it doesn't.
        drawn: Prompts drawn from its posterior, shape `[n, S, P, d]`; None of a point.
    """

    source: Source
    priors: list[Prior]
    nulls: list[Null]
    near: NearestTokens
    trained_on: dict[str, Any]
    drawn: Tensor | None = None

    @property
    def task(self) -> str | None:
        """Name of its own task, where it says so."""
        return self.trained_on.get("task")


def embeddings_of(model: Any) -> Tensor:
    """Every token's embedding as the model looks it up (Gemma scales them), shape `[V, d]`."""
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        return embedding.weight.detach()
    ids = torch.arange(embedding.weight.shape[0], device=embedding.weight.device)
    with torch.no_grad():
        return torch.cat([embedding(part) for part in ids.split(8192)])


def spaces_of(model: Any, tokenizer: Any, sources: Sequence[Source], seed: int) -> dict[int, Space]:
    """The space of every layer that a source has a prompt at."""
    vocabulary = embeddings_of(model)
    excluded = torch.ones(len(vocabulary), dtype=torch.bool)
    excluded[vocabulary_ids(model.get_input_embeddings(), tokenizer)] = False
    spaces = {0: Space(vocabulary, excluded.nonzero().squeeze(-1))}
    deep = sorted({layer for source in sources for layer in source.layers if layer})
    if deep:
        found: list[Any] = vocabulary_reference(model, deep, tokenizer, seed=seed)[0]
        spaces |= {layer: Space(moments.sample) for layer, moments in zip(deep, found, strict=True)}
    return spaces


def draw(prior: Prior, count: int, num_virtual_tokens: int, *key: Any) -> Tensor:
    """Prompts drawn from a prior, shape `[count, P, d]`; the key decides which.

    The generator is not seeded by a plain number: an adapter's own start was drawn from this prior by one, and would
    turn up in its null.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return torch.stack([prior.sample(num_virtual_tokens, generator) for _ in range(count)])


def random_prompts(
    prior: Prior, num_virtual_tokens: int, layer: int, space: Space, metric: str, num_draws: int, seed: int
) -> Null:
    """Draws from a prior and how near they come to a layer's reference."""
    draws = draw(prior, num_draws, num_virtual_tokens, "null", layer, seed)
    parts = draws.split(max(1, _QUERIES // num_virtual_tokens))

    def best(metric: str) -> tuple[Tensor, Tensor]:
        bar = tqdm(parts, "Nearest tokens of draws", delay=2, leave=False)
        found = [best_tokens(part, space.vectors, metric, space.excluded) for part in bar]
        return torch.cat([scores for scores, _ in found]), torch.cat([ids for _, ids in found])

    cosines = best("cosine")
    scores, nearest = cosines if metric == "cosine" or layer else best(metric)
    return Null(draws, scores, cosines[0], nearest)


def prior_digest(prior: Prior) -> str:
    """What tells priors apart, so that one null serves all adapters under the same."""
    digest = hashlib.sha256(type(prior).__name__.encode())
    for name, tensor in sorted(prior.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
