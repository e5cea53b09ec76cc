"""References: the vectors a prior is fitted on, one set for each selected layer, and where they come from."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data import pad
from ..files import atomic_path, cache_dir
from ..sharding import gathered, gathered_in_turn, is_sharded
from .moments import Moments


logger = logging.getLogger(__name__)

Reference = Tensor | Moments

# Tokens fed through the model for a deep prompt's layers: enough for a mean and a shrunk covariance at any width that
# fits a machine, and seconds rather than minutes on two CPU cores.
DEEP_VOCABULARY_TOKENS = 4096
SEQUENCE_LENGTH = 64


@dataclass(frozen=True)
class Provenance:
    """Where a reference came from; kept in `prior_config.json`."""

    source: str
    layer: int
    rows: int
    sha256: str
    model: str | None = None
    revision: str | None = None
    data: str | None = None

    @classmethod
    def of(
        cls, source: str, layer: int, reference: Reference, model: Any | None = None, data: str | None = None
    ) -> "Provenance":
        if isinstance(reference, Moments):
            tensor = torch.cat([reference.mean, reference.covariance.diagonal()])
        else:
            tensor = reference
        content = tensor.detach().float().cpu().contiguous().numpy().tobytes()
        return cls(
            source=source,
            layer=layer,
            rows=reference.shape[0],
            sha256=hashlib.sha256(content).hexdigest(),
            model=getattr(model, "name_or_path", None) or None,
            revision=getattr(getattr(model, "config", None), "_commit_hash", None),
            data=data,
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
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape[1], generator=generator, dtype=torch.float64).to(weight.device)
    projections = torch.cat([part.double() @ direction for part in weight.split(8192)])
    _, inverse, counts = projections.cpu().unique(return_inverse=True, return_counts=True)
    keep &= counts[inverse] == 1
    return keep.nonzero().squeeze(-1)


@torch.no_grad()
def vocabulary_reference(
    model: Any, layers: list[int], tokenizer: Any | None = None, texts: Sequence[str] | None = None, seed: int = 0
) -> tuple[list[Reference], list[Provenance]]:
    """The vocabulary as each selected layer sees it.

    At the embedding layer (0) these are the embeddings of all trained tokens. At a deeper layer they are the hidden
    states that enter it when randomly drawn tokens are fed in sequences; the first position of a sequence is left
    out, because models use it as an attention sink and its states are like no other's.

    Args:
        model: The frozen causal language model.
        layers: Selected layers, 0 the embedding layer.
        tokenizer: Tells which rows are special; without it only untrained rows are left out.
        texts: If given, tokens count as often as they occur in them.
        seed: Of the draw of tokens for the deeper layers.

    Returns:
        A reference and its provenance for each layer.
    """
    embedding = model.get_input_embeddings()
    with gathered(embedding.parameters()):
        ids = vocabulary_ids(embedding, tokenizer)
        # Through the module, not from its weight: some models (Gemma) scale embeddings as they look them up.
        rows = embedding(ids.to(embedding.weight.device)).float().cpu()
    counts = None if texts is None else _occurrences(ids, tokenizer, texts)
    references: dict[int, Reference] = {0: rows}
    if counts is not None:
        weighted = Moments(seed=seed)
        weighted.update(rows[counts > 0], counts[counts > 0])
        references[0] = weighted
    deep = [layer for layer in layers if layer > 0]
    if deep:
        generator = torch.Generator().manual_seed(seed)
        length = _length(model, SEQUENCE_LENGTH)
        shares = torch.ones(len(ids)) if counts is None else counts.float()
        draws = torch.multinomial(shares, DEEP_VOCABULARY_TOKENS, replacement=True, generator=generator)
        sequences = ids[draws][: len(draws) // length * length].view(-1, length)
        batches = [(batch, torch.ones_like(batch)) for batch in sequences.split(8)]

        def compute() -> list[Moments]:
            return _states(model, deep, batches, "Fitting on the vocabulary")

        settings = {"ids": _digest(sequences), "layers": deep}
        references |= dict(zip(deep, cached(model, settings, compute), strict=True))
    data = None if texts is None else _digest(texts)
    found = [references[layer] for layer in layers]
    named = zip(layers, found, strict=True)
    return found, [Provenance.of("vocabulary", layer, one, model, data) for layer, one in named]


@torch.no_grad()
def activation_references(
    model: Any,
    layers: list[int],
    tokenizer: Any,
    corpora: Sequence[Sequence[str]],
    num_tokens: int = 65536,
    max_length: int = 256,
    batch_size: int = 8,
) -> tuple[list[list[Moments]], list[Provenance]]:
    """Hidden states that enter each selected layer as texts run through the frozen model.

    Streamed, so that memory is bounded; padding and first positions (attention sinks) are left out. Of several
    corpora the i-th texts are cut to the same length, so that they don't differ by length.

    Args:
        model: The frozen causal language model.
        layers: Selected layers, 0 the embedding layer.
        tokenizer: Its tokenizer.
        corpora: Texts of each reference.
        num_tokens: Most tokens of each reference.
        max_length: Most tokens of a text.
        batch_size: Texts a batch.

    Returns:
        For each corpus its moments layer by layer, and the provenance of all.
    """
    if not corpora or not all(len(texts) for texts in corpora):
        raise ValueError(f"reference texts must not be empty, got {[len(texts) for texts in corpora]} texts")
    count = min(map(len, corpora))
    encoded = [tokenizer(list(texts[:count]))["input_ids"] for texts in corpora]
    longest = _length(model, max_length)
    lengths = [min(longest, *(len(rows[index]) for rows in encoded)) for index in range(count)]
    found, provenance = [], []
    for texts, rows in zip(corpora, encoded, strict=True):
        cut = [row[:length] for row, length in zip(rows, lengths, strict=True) if length > 1]
        cut = cut[: _enough(cut, num_tokens)]
        if not cut:
            raise ValueError("reference texts must have at least 2 tokens each, got shorter ones only")
        batches = [_padded(cut[start : start + batch_size]) for start in range(0, len(cut), batch_size)]
        settings = {"ids": _digest(cut), "layers": layers}

        def compute(batches: list[tuple[Tensor, Tensor]] = batches) -> list[Moments]:
            return _states(model, layers, batches, "Fitting on activations")

        moments = cached(model, settings, compute)
        found.append(moments)
        data = _digest(list(texts[:count]))
        pairs = zip(layers, moments, strict=True)
        provenance += [Provenance.of("activations", layer, one, model, data) for layer, one in pairs]
    return found, provenance


@torch.no_grad()
def text_states(model: Any, layers: list[int], ids: Tensor) -> list[Tensor]:
    """What enters each selected layer when the tokens `ids` `[P]` are fed, each `[P, d]`."""
    device = model.get_input_embeddings().weight.device
    return [states[0] for states in _layer_inputs(model, layers, input_ids=ids[None].to(device))]


@torch.no_grad()
def prompt_states(model: Any, layers: list[int], prompt: Tensor) -> list[Tensor]:
    """What enters each selected layer when a soft prompt `[P, d]` is fed, each `[P, d]`."""
    embedded = prompt[None].to(model.get_input_embeddings().weight)
    return [states[0].cpu() for states in _layer_inputs(model, layers, inputs_embeds=embedded)]


def cached(model: Any, settings: dict[str, Any], compute: Callable[[], list[Moments]]) -> list[Moments]:
    """What `compute` gives, kept in the cache folder under the model's weights and the settings."""
    if is_sharded(model):
        return compute()  # by all processes, even if one of them has it in its cache
    # Two sums of every weight: the name stays when weights are merged or edited in memory.
    fingerprint = [
        (part.detach().float().sum().item(), part.detach().float().abs().sum().item()) for part in model.parameters()
    ]
    identity = {"model": model.name_or_path, "revision": getattr(model.config, "_commit_hash", None)}
    identity |= {"weights": fingerprint, "dtype": str(model.dtype)} | settings
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "references" / f"{key}.safetensors"
    if path.is_file():
        try:
            state = load_file(path)
            count = 1 + max(int(name.split(".")[0]) for name in state)
            parts = [{n.split(".", 1)[1]: t for n, t in state.items() if n.startswith(f"{i}.")} for i in range(count)]
            return [Moments.from_state_dict(part) for part in parts]
        except (SafetensorError, KeyError, ValueError) as error:
            logger.warning("The cached reference %s is damaged (%s); it is computed again.", path.name, error)
    found = compute()
    state = {
        f"{index}.{name}": t.contiguous() for index, one in enumerate(found) for name, t in one.state_dict().items()
    }
    try:
        with atomic_path(path) as temporary:
            save_file(state, temporary)
    except OSError as error:
        logger.warning("The reference could not be cached (%s); it will be computed again.", error)
    return found


def _states(model: Any, layers: list[int], batches: list[tuple[Tensor, Tensor]], desc: str) -> list[Moments]:
    found = [Moments() for _ in layers]
    device = model.get_input_embeddings().weight.device
    for ids, mask in tqdm(batches, desc=desc, disable=len(batches) < 8):
        # First positions are attention sinks: in many models their states are a hundred times longer.
        counted = mask.bool()
        counted[:, 0] = False
        inputs = _layer_inputs(model, layers, input_ids=ids.to(device), attention_mask=mask.to(device))
        for moments, states in zip(found, inputs, strict=True):
            moments.update(states.cpu()[counted])
    return found


def _layer_inputs(model: Any, layers: list[int], **inputs: Tensor) -> list[Tensor]:
    hidden: Any = ()
    training = model.training
    model.eval()
    try:
        with gathered_in_turn(model):
            if any(layers):
                hidden = model.base_model(**inputs, output_hidden_states=True).hidden_states
            # The prompt enters before positions are added (GPT-2), so layer 0 is the embedding itself.
            start = inputs.get("inputs_embeds")
            if start is None:
                start = model.get_input_embeddings()(inputs["input_ids"])
            return [(hidden[layer] if layer else start).float() for layer in layers]
    finally:
        model.train(training)


def _occurrences(ids: Tensor, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    flat = torch.tensor([token for row in tokenizer(list(texts))["input_ids"] for token in row])
    counts = torch.bincount(flat, minlength=int(ids.max()) + 1)[ids]
    if not counts.any():
        raise ValueError("reference texts must hold ordinary tokens of the vocabulary, got none")
    return counts


def _length(model: Any, wanted: int) -> int:
    return min(wanted, getattr(model.config.get_text_config(), "max_position_embeddings", None) or wanted)


def _enough(rows: list[list[int]], num_tokens: int) -> int:
    total = 0
    for index, row in enumerate(rows):
        total += len(row)
        if total >= num_tokens:
            return index + 1
    return len(rows)


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return pad(rows, 0, "right"), pad([[1] * len(row) for row in rows], 0, "right")


def _digest(value: Any) -> str:
    content = json.dumps(value.tolist() if isinstance(value, Tensor) else list(value), ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()
