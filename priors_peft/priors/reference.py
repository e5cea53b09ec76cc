"""References: the vectors a prior is fitted on, one set for each selected layer, and where they come from."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


# Rows fed through the model for a deep prompt's layers: enough for a mean and a shrunk covariance at any width that
# fits a machine, and seconds rather than minutes on two CPU cores.
DEEP_REFERENCE_ROWS = 4096
DEEP_REFERENCE_LENGTH = 64


@dataclass(frozen=True)
class Provenance:
    """Where a reference came from; kept in `prior_config.json`."""

    source: str
    layer: int
    rows: int
    sha256: str
    model: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, source: str, layer: int, reference: Tensor, model: Any | None = None) -> "Provenance":
        data = reference.detach().float().cpu().contiguous().numpy().tobytes()
        return cls(
            source=source,
            layer=layer,
            rows=len(reference),
            sha256=hashlib.sha256(data).hexdigest(),
            model=getattr(model, "name_or_path", None) or None,
            revision=getattr(getattr(model, "config", None), "_commit_hash", None),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def vocabulary_ids(embedding: Any, tokenizer: Any | None) -> Tensor:
    """Ids of the vocabulary rows that training shaped, shape `[n]`.

    Left out: special and added tokens, rows past the tokenizer's vocabulary, and rows that were never trained, known
    by being zero, copies of one another, or of a norm under 5 % of the median.
    """
    weight = embedding.weight.detach()
    keep = torch.ones(weight.shape[0], dtype=torch.bool)
    if tokenizer is not None:
        keep[len(tokenizer) :] = False
        special = [*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})]
        keep[[index for index in special if index < len(keep)]] = False
    norms = weight.float().norm(dim=-1).cpu()
    keep &= norms > 0.05 * norms[keep].median()
    # Equal rows have equal projections; comparing those costs n log n instead of sorting whole rows.
    direction = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    _, inverse, counts = (weight.float() @ direction).cpu().unique(return_inverse=True, return_counts=True)
    keep &= counts[inverse] == 1
    return keep.nonzero().squeeze(-1)


@torch.no_grad()
def vocabulary_reference(
    model: Any, layers: list[int], tokenizer: Any | None = None, seed: int = 0
) -> tuple[list[Tensor], list[Provenance]]:
    """The vocabulary as each selected layer sees it.

    At the embedding layer (0) these are the embeddings of all trained tokens. At a deeper layer they are the hidden
    states that enter it when randomly drawn tokens are fed in sequences; the first position of a sequence is left
    out, because models use it as an attention sink and its states are like no other's.

    Args:
        model: The frozen causal language model.
        layers: Selected layers, 0 the embedding layer.
        tokenizer: Tells which rows are special; without it only untrained rows are left out.
        seed: Of the draw of tokens for the deeper layers.

    Returns:
        One `[n, d]` tensor and one provenance for each layer.
    """
    embedding = model.get_input_embeddings()
    ids = vocabulary_ids(embedding, tokenizer)
    device = embedding.weight.device
    # Through the module, not from its weight: some models (Gemma) scale embeddings as they look them up.
    states = {0: embedding(ids.to(device)).float().cpu()}
    deep = [layer for layer in layers if layer > 0]
    if deep:
        generator = torch.Generator().manual_seed(seed)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", DEEP_REFERENCE_LENGTH)
        length = min(DEEP_REFERENCE_LENGTH, context)
        count = max(1, DEEP_REFERENCE_ROWS // (length - 1))
        draws = ids[torch.randint(len(ids), (count, length), generator=generator)]
        chunks = []
        for batch in draws.split(8):
            hidden = model.base_model(input_ids=batch.to(device), output_hidden_states=True).hidden_states
            chunks.append([hidden[layer][:, 1:].flatten(0, 1).float().cpu() for layer in deep])
        states |= {layer: torch.cat(parts) for layer, parts in zip(deep, zip(*chunks, strict=True), strict=True)}
    provenance = [Provenance.of("vocabulary", layer, states[layer], model) for layer in layers]
    return [states[layer] for layer in layers], provenance
