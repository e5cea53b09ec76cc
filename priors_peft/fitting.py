"""A new prompt: the priors that a configuration asks for, fitted on this model, and a start drawn from them."""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from . import __version__
from .architecture import supports_prompt_cache
from .config import PriorConfig
from .files import atomic_path, cache_dir
from .names import check_choice
from .priors import Moments, Prior, TaskPosteriors, own_prior, prior_class
from .priors.reference import Provenance, activation_references, prompt_states, text_states, vocabulary_reference
from .prompt import PriorPromptEncoder
from .sharding import shape


logger = logging.getLogger(__name__)


def complete(config: PriorConfig, model: Any) -> list[int]:
    """Fill in what PEFT keeps about the base model; return the selected layers.

    Raises:
        ValueError: The configuration does not fit the base model.
    """
    text_config = model.config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and config.num_virtual_tokens >= context:
        raise ValueError(
            f"num_virtual_tokens must leave room for text in the model's context of {context} tokens, got "
            f"{config.num_virtual_tokens}"
        )
    config.num_layers = text_config.num_hidden_layers
    layers = config.selected_layers(config.num_layers)
    config.token_dim = shape(model.get_input_embeddings().weight)[1]
    if len(layers) > 1 and config.token_dim != text_config.hidden_size:
        raise ValueError(
            f'tuning must be "soft" for a model whose embeddings ({config.token_dim}) and hidden states '
            f'({text_config.hidden_size}) differ in width, got "deep"'
        )
    if len(layers) > 1 and not supports_prompt_cache(model):
        raise ValueError(
            f'tuning must be "soft" for {type(model).__name__}, which has no key/value cache of every '
            'layer, got "deep"'
        )
    config.num_attention_heads = text_config.num_attention_heads
    config.num_transformer_submodules = 1
    name = config.base_model_name_or_path or model.name_or_path or None
    # A path that leads out of a folder means nothing to who loads the adapter from elsewhere, and is refused there.
    config.base_model_name_or_path = os.path.abspath(name) if name and ".." in Path(name).parts else name
    config.revision = config.revision or getattr(model.config, "_commit_hash", None)
    json.dumps(config.to_dict())  # what can't be saved is found out now and not after training
    return layers


def new_encoder(
    model: Any, config: PriorConfig, layers: list[int], tokenizer: Any | None
) -> tuple[PriorPromptEncoder, list[Provenance]]:
    """An untrained prompt encoder, and where its priors' references came from.

    Args:
        model: The frozen base model.
        config: What is asked for.
        layers: The selected layers.
        tokenizer: The base model's tokenizer; references and descriptions made of text need it.

    Raises:
        ValueError: A setting is not one of the family's, or lacks what it needs.
    """
    if isinstance(config.prior, (Prior, Distribution)):
        priors: list[Prior] = [own_prior(config.prior) for _ in layers]
        provenance: list[Provenance] = []
    else:
        references, provenance = _references(model, config, layers, tokenizer)
        family = prior_class(config.prior)
        settings = [dict(config.prior_kwargs) for _ in layers]
        if config.prior == "text":
            settings = _described(model, config, layers, tokenizer)
        if has_free_scale(config):
            for own in settings:
                del own["scale"]
        _check_settings(config.prior, family, settings[0])
        priors = []
        pairs = zip(references, settings, provenance, strict=False)
        # At once where a fit takes long, so that it is not a silent minute; else only if it does.
        delay = 0 if config.token_dim >= 2048 else 2
        for reference, own, origin in tqdm(pairs, "Fitting the prior", len(layers), delay=delay, leave=False):
            priors.append(_fitted(family, reference, own, origin))
    for prior in priors:
        if prior.dim != config.token_dim:
            raise ValueError(f"prior must have the model's width {config.token_dim}, got one of width {prior.dim}")
    return PriorPromptEncoder(priors, config.coordinates, new_prompt(model, config, priors, config.seed)), provenance


def new_prompt(model: Any, config: PriorConfig, priors: Iterable[Prior], seed: int) -> Tensor:
    """Where training begins, shape `[S, P, d]`.

    Args:
        model: The frozen base model.
        config: Whose `num_layers` is filled in.
        priors: Of the selected layers, on the CPU.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.stack([prior.sample(config.num_virtual_tokens, generator) for prior in priors])
    layers = config.selected_layers(config.num_layers or 0)
    if config.deep_init == "states" and len(layers) > 1:
        prompt[1:] = torch.stack(prompt_states(model, layers[1:], prompt[0]))
    return prompt


def has_free_scale(config: PriorConfig) -> bool:
    """Whether the prior's scale is to be the one of most evidence."""
    return config.prior_kwargs.get("scale") == "evidence"


def _fitted(family: type[Prior], reference: Any, settings: dict[str, Any], origin: Provenance) -> Prior:
    """The family fitted on a reference; kept in the cache folder where the reference and the settings identify it."""
    if not isinstance(reference, (Tensor, Moments)) or any(isinstance(value, Tensor) for value in settings.values()):
        return family.fit(reference, **settings)
    identity = json.dumps([family.__name__, settings, origin.to_dict(), __version__], sort_keys=True)
    path = cache_dir() / "priors" / f"{hashlib.sha256(identity.encode()).hexdigest()}.safetensors"
    if path.is_file():
        try:
            return family.from_state_dict(load_file(path))
        except (SafetensorError, ValueError) as error:
            logger.warning("The cached prior %s is damaged (%s); it is fitted again.", path.name, error)
    prior = family.fit(reference, **settings)
    try:
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in prior.state_dict().items()}, temporary)
    except OSError as error:
        logger.warning("The prior could not be cached (%s); it will be fitted again.", error)
    return prior


def texts_of(data: Any) -> list[str]:
    """Texts of a list of strings, or of rows with `text`, or with `prompt` and `completion`."""
    if isinstance(data, str):
        raise ValueError(f"data must be a list of texts or rows, got the one text {data[:40]!r}: put it into a list")
    rows = list(data)
    if rows and isinstance(rows[0], str):
        return rows
    if rows and isinstance(rows[0], dict) and "text" in rows[0]:
        return [row["text"] for row in rows]
    if rows and isinstance(rows[0], dict) and {"prompt", "completion"} <= rows[0].keys():
        return [row["prompt"] + row["completion"] for row in rows]
    got = f"rows with {sorted(rows[0])}" if rows and isinstance(rows[0], dict) else f"{len(rows)} rows"
    raise ValueError(f"data must be strings, or rows with text or with prompt and completion, got {got}")


def _references(
    model: Any, config: PriorConfig, layers: list[int], tokenizer: Any | None
) -> tuple[Any, list[Provenance]]:
    """One reference for each layer: rows, moments, two of them, or trained prompts, as the family takes them."""
    reference, settings = config.reference, dict(config.reference_kwargs)
    if isinstance(reference, Tensor):
        return [reference] * len(layers), [Provenance.of("tensor", layer, reference) for layer in layers]
    if isinstance(reference, (tuple, list)):
        return [tuple(reference)] * len(layers), [
            Provenance.of("tensor", layer, part) for part in reference for layer in layers
        ]
    known = {"adapters": ["adapters"], "activations": ["data", "num_tokens", "max_length", "batch_size"]}
    for key in settings:
        check_choice(f"a key in reference_kwargs of reference={reference!r}", key, known.get(reference, ["data"]))
    if reference == "adapters":
        return _trained(settings, layers, config)
    if reference == "activations":
        if tokenizer is None or not settings.get("data"):
            raise ValueError(
                'reference="activations" needs a tokenizer and reference_kwargs={"data": texts or rows}, two of them '
                f"for an interpolation; got {'no tokenizer' if tokenizer is None else sorted(settings)}"
            )
        data = settings.pop("data")
        corpora = [texts_of(part) for part in data] if config.prior == "interpolation" else [texts_of(data)]
        found, provenance = activation_references(model, layers, tokenizer, corpora, **settings)
        return found[0] if len(found) == 1 else list(zip(*found, strict=True)), provenance
    if config.prior == "interpolation":
        raise ValueError(
            'prior="interpolation" needs two references: reference=(a, b), or reference="activations" with '
            f'reference_kwargs={{"data": [a, b]}}, got reference={reference!r}'
        )
    texts = texts_of(settings["data"]) if "data" in settings else None
    return vocabulary_reference(model, layers, tokenizer, texts, config.seed)


def _trained(settings: dict[str, Any], layers: list[int], config: PriorConfig) -> tuple[Any, list[Provenance]]:
    from .hub.adapter import read_adapter

    adapters = settings.get("adapters")
    if not adapters or isinstance(adapters, str):
        raise ValueError(
            f'reference="adapters" needs reference_kwargs={{"adapters": [folders or ids]}}, got {settings}'
        )
    saved = [read_adapter(adapter) for adapter in adapters]
    prompts = [one.prompt for one in saved]
    wanted = (len(layers), config.num_virtual_tokens, config.token_dim)
    for adapter, prompt in zip(adapters, prompts, strict=True):
        if tuple(prompt.shape) != wanted:
            raise ValueError(f"adapters must hold prompts of shape {wanted}, got {tuple(prompt.shape)} in {adapter}")
    stacked = torch.stack(prompts, dim=1)
    provenance = [Provenance.of("adapters", layer, part) for layer, part in zip(layers, stacked, strict=True)]
    # Families of single vectors take all virtual tokens of all prompts; the empirical one takes prompts, or posteriors.
    if config.prior == "empirical" and any(one.posterior for one in saved):
        encoders = [one.encoder() for one in saved]
        means = torch.stack([encoder.mean().detach() for encoder in encoders], dim=1)
        variances = torch.stack([encoder.variance() for encoder in encoders], dim=1)
        priors = zip(*(one.priors for one in saved), strict=True)
        return list(map(TaskPosteriors, priors, means, variances)), provenance
    return stacked if config.prior == "empirical" else stacked.flatten(1, 2), provenance


def _described(model: Any, config: PriorConfig, layers: list[int], tokenizer: Any | None) -> list[dict[str, Any]]:
    """Settings of the text prior for each layer: the description's own states there."""
    settings = dict(config.prior_kwargs)
    text = settings.pop("text", None)
    if not isinstance(text, str) or not text.strip() or tokenizer is None:
        got = "no tokenizer" if tokenizer is None else repr(text)
        raise ValueError(f'prior="text" needs a tokenizer and prior_kwargs={{"text": a description}}, got {got}')
    ids = torch.tensor(tokenizer(text)["input_ids"])
    if len(ids) > config.num_virtual_tokens:
        logger.warning(
            "the description has %d tokens, of which the first %d are taken: num_virtual_tokens=%d takes all",
            len(ids),
            config.num_virtual_tokens,
            len(ids),
        )
    # Trimmed or repeated to P before it is fed, so that a deep prompt of spread 0 is that text to the model.
    count = config.num_virtual_tokens
    ids = ids[torch.arange(count) % len(ids)]
    states = text_states(model, layers, ids)
    return [settings | {"token_embeddings": one.cpu(), "num_virtual_tokens": count} for one in states]


def _check_settings(name: str, family: type[Prior], settings: dict[str, Any]) -> None:
    parameters = inspect.signature(family.fit).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # the family checks them itself
    known = [key for key in parameters if key != "reference"]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        if name == "text":  # as a user names them: the tokens and their number come from the description
            known = ["text", *(key for key in known if key not in ("token_embeddings", "num_virtual_tokens"))]
        raise ValueError(f"prior_kwargs of prior={name!r} must be among {', '.join(known)}, got {', '.join(unknown)}")
