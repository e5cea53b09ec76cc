"""How prompts and text run through the frozen layers; every way gives the same final hidden states.

They come back to the device that the text went in on: a model's layers may lie on several.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from .architecture import decoder, decoder_layers, expand_cache, replace_prompts
from .batch import Supervision, Text
from .packing import Layout, pack, packed_attention


@dataclass(frozen=True)
class Prompt:
    """A prompt in a batch.

    Args:
        theta: Shape `[S, P, d]`.
        layers: The S layers whose inputs it replaces.
        rows: The rows of the batch that it comes before.
        log_prior: In training what the objective adds to the likelihood, in nats.
    """

    theta: Tensor
    layers: list[int]
    rows: list[int]
    log_prior: Tensor | None = None

    @property
    def length(self) -> int:
        return self.theta.shape[1]


@dataclass(frozen=True)
class PromptState:
    """What the text needs of a prompt that has run: its key/value cache at batch 1, its last hidden state `[1, 1, d]`."""

    cache: DynamicCache
    last: Tensor


def prompt_pass(model: PreTrainedModel, prompt: Prompt) -> PromptState:
    """Run the virtual tokens alone: in a causal model they never see the text, so once is enough for all rows."""
    start = prompt.theta[:1].to(model.get_input_embeddings().weight.dtype)
    with deep_prompts(model, [(0, prompt)]):
        outputs = decoder(model)(inputs_embeds=start, use_cache=True)
    return PromptState(outputs.past_key_values, outputs.last_hidden_state[:, -1:].to(start.device))


def packed_pass(
    model: PreTrainedModel,
    prompts: list[Prompt],
    state: PromptState | None,
    text: Text,
    supervision: Supervision,
    options: dict[str, Any],
) -> Tensor:
    """All prompts and rows as one sequence without padding.

    Args:
        model: The base model.
        prompts: The prompts of the batch.
        state: Of a lone prompt that has run before.
        text: The batch's text.
        supervision: Whose predictors are wanted.
        options: For the base model.

    Returns:
        The final hidden states that predict supervised tokens, shape `[N, d]`.
    """
    packed = pack(text, supervision, [(prompt.length, prompt.rows) for prompt in prompts])
    given = text.input_ids if text.inputs_embeds is None else text.inputs_embeds
    embed = model.get_input_embeddings()
    sequence = []
    for prompt, tokens in zip(prompts, packed.tokens, strict=True):
        chosen = given.flatten(0, 1)[tokens]  # type: ignore[union-attr]
        embedded = embed(chosen) if text.inputs_embeds is None else chosen
        sequence += [embedded] if state else [prompt.theta[0].to(embedded.dtype), embedded]
    embeddings, cached = torch.cat(sequence)[None], prompts[0].length if state else 0
    if state and embeddings.shape[1] == 0:
        return state.last[0, 0].expand(len(packed.predictors), -1)
    with (
        packed_attention(model, Layout(packed.stretches, cached)),
        deep_prompts(model, list(zip(packed.starts, prompts, strict=True)), cached),
    ):
        hidden = decoder(model)(
            inputs_embeds=embeddings,
            position_ids=packed.position_ids[:, cached:],
            past_key_values=expand_cache(state.cache, 1) if state else None,
            **{"use_cache": False, **options},
        ).last_hidden_state.to(embeddings.device)
    if state:
        hidden = torch.cat([state.last, hidden], dim=1)
    return hidden[0, packed.predictors - (cached - 1 if state else 0)]


def cached_pass(model: PreTrainedModel, state: PromptState, text: Text, options: dict[str, Any]) -> Any:
    """The text, padded, over the prompt's cache; the final states `[B, 1 + L, d]` begin with the last virtual token's."""
    text, cache = text.after(state.cache.get_seq_length()), expand_cache(state.cache, text.batch_size)
    outputs = continued(decoder(model), text, cache, options)
    last = state.last.expand(text.batch_size, -1, -1)
    outputs.last_hidden_state = torch.cat([last, outputs.last_hidden_state.to(last.device)], dim=1)
    return outputs


def continued(model: nn.Module, text: Text, cache: Any, options: dict[str, Any]) -> Any:
    """Text whose mask and positions count the prompt, through a model or its layers over a cache."""
    return model(
        input_ids=text.input_ids,
        inputs_embeds=text.inputs_embeds,
        attention_mask=text.attention_mask,
        past_key_values=cache,
        **positions(model, text.position_ids),
        **{"use_cache": False, **options},
    )


def concatenated_pass(model: PreTrainedModel, prompt: Prompt, text: Text, options: dict[str, Any]) -> Any:
    """Prompt and text as one padded sequence, for gradient checkpointing and models without a key/value cache."""
    text, count = text.after(prompt.length), prompt.length
    position_ids = text.position_ids
    if position_ids is not None:
        before = torch.arange(count, device=position_ids.device).expand(text.batch_size, -1)
        position_ids = torch.cat([before, position_ids], dim=1)
    embeddings = prompted_embeddings(model, prompt, text)
    with deep_prompts(model, [(0, prompt)]):
        outputs = decoder(model)(
            inputs_embeds=embeddings,
            attention_mask=text.attention_mask,
            **positions(model, position_ids),
            **{"use_cache": False, **options},
        )
    if outputs.get("hidden_states") is not None:
        outputs.hidden_states = tuple(hidden[:, count:] for hidden in outputs.hidden_states)
    outputs.last_hidden_state = outputs.last_hidden_state[:, count - 1 :].to(embeddings.device)
    return outputs


def prompted_embeddings(model: PreTrainedModel, prompt: Prompt, text: Text) -> Tensor:
    """The embedding layer's θ before the text's embeddings, shape `[B, P + L, d]`."""
    embeddings = text.inputs_embeds
    if embeddings is None:
        embeddings = model.get_input_embeddings()(text.input_ids)
    return torch.cat([prompt.theta[0].to(embeddings.dtype).expand(len(embeddings), -1, -1), embeddings], dim=1)


def positions(model: nn.Module, position_ids: Tensor | None) -> dict[str, Tensor]:
    """`position_ids` where the model takes them: BLOOM counts the attention mask, MPT the keys."""
    accepted = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": position_ids} if accepted and position_ids is not None else {}


@contextmanager
def deep_prompts(model: PreTrainedModel, prompts: list[tuple[int, Prompt]], cached: int = 0) -> Iterator[None]:
    """Replace hidden states at prompts' positions, which start where it is said, at the input of selected deeper layers."""
    handles = []
    if not cached and any(len(prompt.layers) > 1 for _, prompt in prompts):
        blocks = decoder_layers(model)
        for layer, block in enumerate(blocks):
            thetas = [
                (start, prompt.theta[prompt.layers.index(layer)])
                for start, prompt in prompts
                if layer and layer in prompt.layers
            ]
            if thetas:
                handles.append(block.register_forward_pre_hook(replace_prompts(thetas), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
