"""Text after a prompt, by `transformers`' `generate`: what it is given besides the text."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .architecture import expand_cache
from .batch import Text, extended_mask
from .inference.predictive import averaging_forward, joined_caches
from .passes import Prompt, deep_prompts, prompted_embeddings


_REPEATING = ("num_beams", "num_return_sequences")


def generate_after(
    model: PreTrainedModel, prompt: Prompt, caches: list[DynamicCache], inputs: Tensor | None, options: dict[str, Any]
) -> Any:
    """Generate after a prompt, with the arguments and the results of the base model's `generate`.

    Args:
        model: The base model.
        prompt: The prompt.
        caches: Its key/value cache at batch 1; those of several draws, whose token probabilities are then averaged; none
            where a cache can't stand for a prompt.
        inputs: `generate`'s first argument, where ids are not among the others.
        options: The others.

    Raises:
        ValueError: There is no text, or it does not fit the model's context.
    """
    input_ids, embeddings = options.pop("input_ids", inputs), options.pop("inputs_embeds", None)
    text = input_ids if embeddings is None else embeddings
    if text is None:
        raise ValueError("input_ids or inputs_embeds must be given, got neither")
    mask = options.pop("attention_mask", None)
    config = options.get("generation_config") or model.generation_config
    if mask is None:
        pad = config.pad_token_id
        inferable = embeddings is None and pad is not None and pad not in _as_list(config.eos_token_id)
        mask = text.ne(pad).long() if inferable else torch.ones(text.shape[:2], device=text.device).long()
    rows = Text(input_ids, embeddings, mask, None)
    rows.check_fits(model, prompt.length)
    options["attention_mask"] = extended_mask(mask, prompt.length)
    if not caches:
        options["inputs_embeds"] = prompted_embeddings(model, prompt, rows)
        with deep_prompts(model, [(0, prompt)]):
            generated = model.generate(**options)
        return generated if input_ids is None else _prepended(input_ids, generated)
    if embeddings is not None:
        # generate drops as many leading embeddings as the cache has positions
        options["inputs_embeds"] = prompted_embeddings(model, prompt, rows)
    # Beams and samples are rows too; generate repeats its tensors for them but not a cache.
    repeats = max(options.get(name) or getattr(config, name, None) or 1 for name in _REPEATING)
    # Trainer switches the cache off in the base model's configuration; here it holds the prompt.
    options["use_cache"] = True
    if len(caches) == 1:
        options["past_key_values"] = expand_cache(caches[0], len(text) * repeats)
        return model.generate(input_ids, **options)
    options["past_key_values"] = joined_caches(caches, len(text) * repeats)
    with averaging_forward(model, len(caches)):
        return model.generate(input_ids, **options)


def _prepended(input_ids: Tensor, generated: Any) -> Any:
    # From embeddings, generate returns the new tokens only; from ids, the ids come first.
    if isinstance(generated, Tensor):
        return torch.cat([input_ids.repeat_interleave(len(generated) // len(input_ids), 0), generated], dim=1)
    generated.sequences = _prepended(input_ids, generated.sequences)
    return generated


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
