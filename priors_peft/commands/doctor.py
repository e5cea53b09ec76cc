"""`priors-peft doctor`: versions, the device, and what a model supports."""

import importlib.metadata
import platform
from typing import Any

import torch

from ..architecture import check_base_model, decoder_layers, supports_prompt_cache
from ..packing import supports_packing
from ..priors import prior_names
from ..priors.reference import vocabulary_ids
from .arguments import ModelArguments, parse
from .train import base_model_from


PACKAGES = ("priors_peft", "torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "deepspeed")


def main(arguments: list[str]) -> None:
    """Print one fact a line; with `--model`, the model's too."""
    (model_arguments,) = parse((ModelArguments,), arguments, "priors-peft doctor")
    for name, value in {"python": platform.python_version(), **versions(), "device": device()}.items():
        print(f"{name:<24}{value}")
    print(f"{'priors':<24}{', '.join(prior_names())}")
    if model_arguments.model:
        for name, value in model_facts(*base_model_from(model_arguments)).items():
            print(f"{name:<24}{value}")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> str:
    """The accelerator, or how many CPU threads."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"
    return f"CPU, {torch.get_num_threads()} threads"


def model_facts(model: Any, tokenizer: Any) -> dict[str, str]:
    """What a base model supports, or why it supports nothing."""
    name = type(model).__name__
    try:
        check_base_model(model)
    except ValueError as error:
        return {"model": name, "supported": f"no: {error}"}
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        rows = embedding(vocabulary_ids(embedding, tokenizer).to(embedding.weight.device)).float()
    cached = supports_prompt_cache(model)
    try:
        decoder_layers(model)
        deep = "yes" if cached else "no: the model has no key/value cache of every layer"
    except ValueError as error:
        deep = f"no: {error}"
    return {
        "model": f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}",
        "training": _way(model),
        "deep prompts": deep,
        "hidden size": f"{config.hidden_size} ({config.num_hidden_layers} layers)",
        "context": f"{getattr(config, 'max_position_embeddings', 'unlimited')} tokens",
        "vocabulary": f"{embedding.weight.shape[0]:,} rows, {len(rows):,} of them trained and not special",
        "embedding scale": f"standard deviation {rows.std().item():.4f}, mean norm {rows.norm(dim=-1).mean().item():.3f}",
    }


def _way(model: Any) -> str:
    if not supports_prompt_cache(model):
        return "prompt and text as padded rows: the prompt is computed in every row"
    if supports_packing(model):
        return "rows as one sequence without padding, the prompt once a batch"
    return "padded rows over the prompt's cache, which is computed once a batch"
