"""What is asked of base models: that they can take a prompt, where their layers are, and their key/value caches."""

import copy
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


def check_base_model(model: nn.Module) -> None:
    """Raise `ValueError` unless `model` is a decoder-only language model with input and output embeddings."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {name}")
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if not isinstance(getattr(embeddings, "weight", None), Tensor):
        raise ValueError(f"model must have input embeddings to put a prompt beside, got {name} without any")
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", True) is False and _is_encoder(model):
        raise ValueError(f"model must be decoder-only (load it with AutoModelForCausalLM), got {name}")
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise ValueError(f"model must have a language-model head (load it with AutoModelForCausalLM), got {name}")
    decoder(model)


def _is_encoder(model: PreTrainedModel) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def supports_prompt_cache(model: PreTrainedModel) -> bool:
    """Whether a prompt's key/value cache stands for the prompt exactly: attention layers only, and a cache argument."""
    if getattr(model, "_is_stateful", False):
        return False
    if "past_key_values" not in inspect.signature(decoder(model).forward).parameters:
        return False
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def decoder(model: PreTrainedModel) -> nn.Module:
    """What the model's forward runs before its head.

    Raises:
        ValueError: It could not be found.
    """
    for module in (model.get_decoder(), getattr(model, "model", None)):
        if isinstance(module, nn.Module) and module is not model:
            return module
    raise ValueError(f"model must keep its layers in a module of their own, got {type(model).__name__}")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers, wherever the architecture keeps it.

    Raises:
        ValueError: There is no list of `num_hidden_layers` modules.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f'tuning must be "soft" for {type(model).__name__}: its decoder layers could not be found')


def activation_functions(model: PreTrainedModel) -> list[nn.Module]:
    """The activation function of each decoder layer's feed-forward block, whose values are the block's neurons.

    Raises:
        ValueError: A layer has none that is a module of its own, or several (experts).
    """
    known = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())
    functions = []
    for number, layer in enumerate(decoder_layers(model)):
        found = [part for part in layer.modules() if isinstance(part, known) or type(part).__name__ == "BloomGelu"]
        if len(found) != 1:
            raise ValueError(
                f"each layer must have one activation function for its neurons to be told, got {len(found)} in layer "
                f"{number} of {type(model).__name__}"
            )
        functions += found
    return functions


def expand_cache(cache: DynamicCache, batch_size: int) -> DynamicCache:
    """A view of a batch-1 cache for `batch_size` rows; growing it leaves `cache` as it was."""
    expanded = copy.copy(cache)
    expanded.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in expanded.layers:
        if layer.is_initialized:
            layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
            layer.values = layer.values.expand(batch_size, -1, -1, -1)
    return expanded


def replace_prompts(
    prompts: list[tuple[int, Tensor]],
) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict] | None]:
    """A hook that puts each θ `[P, d]` in the place of the hidden states from its start on, in order of starts."""
    end = prompts[-1][0] + len(prompts[-1][1])

    def replace(module: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict] | None:
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        if hidden.shape[1] < end:
            return None  # a decoding step: the prompt has gone by
        parts, cursor = [], 0
        for start, theta in prompts:
            parts += [hidden[:, cursor:start], theta.to(hidden).expand(len(hidden), -1, -1)]
            cursor = start + len(theta)
        hidden = torch.cat([*parts, hidden[:, cursor:]], dim=1)
        if arguments:
            return (hidden, *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": hidden}

    return replace
