"""A tuned prompt for tools that know nothing of priors_peft: a stock adapter, a plain checkpoint, or bare embeddings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_folder, atomic_path, write_json
from ..names import check_choice
from .adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter, stock_adapter
from .loading import base_model_of, load_tuned
from .reading import required


if TYPE_CHECKING:
    import torch

    from .adapter import SavedAdapter

# The formats, and which of them hold deep prompts: those keep a state of every layer.
FORMATS = {"peft": True, "prefix": True, "checkpoint": False, "prompt-embeds": False}
# What a safetensors file of ours says of a prompt that is more than a point.


def export_adapter(
    adapter: str | os.PathLike,
    to: str,
    out: str | os.PathLike,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    **hub_arguments: Any,
) -> Path:
    """Write a prompt for another tool; docs/exports.md says which tool reads what. Of a posterior the one prompt that stands for it is written.

    Args:
        adapter: A local folder or a Hub id.
        to: `"peft"`, a stock PEFT adapter alone; `"prefix"`, a stock PREFIX_TUNING adapter that holds the prompt's
            key/value cache; `"checkpoint"`, a plain `transformers` checkpoint with the virtual tokens in its vocabulary;
            `"prompt-embeds"`, a safetensors file with `prompt_embeds` `[P, d]`.
        out: The folder to write, or for `prompt-embeds` the file; it must not exist, or be an empty folder.
        base_model: A Hub id, a folder or `"bundled:smollm2-135m"`; by default what the adapter names. `prefix` and
            `checkpoint` need it.
        base_revision: Branch, tag or commit of the base model.
        dtype: In which `prefix` runs the base model; the other formats have no use for it.
        trust_remote_code: Allow the base model to run its own code.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... of the adapter.

    Returns:
        What was written.

    Raises:
        ValueError: The format is unknown, can't hold this prompt, or the base model can't be written with it.
        FileExistsError: `out` is taken.
        OSError: The adapter or the base model is out of reach, or `out` can't be written.
    """
    check_choice("to", to, FORMATS)
    out = Path(out)
    saved = read_adapter(adapter, **hub_arguments)
    if saved.config.tuning == "deep" and not FORMATS[to]:
        raise ValueError(
            f"to must be {' or '.join(name for name, deep in FORMATS.items() if deep)} for a deep prompt, got {to!r}: "
            "only these hold a state of every layer"
        )
    if to == "peft" or (to == "prefix" and saved.config.tuning == "deep"):
        with atomic_folder(out) as folder:
            for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                shutil.copyfile(required(adapter, file, hub_arguments), folder / file)
    elif to == "prefix":
        _write_prefix(
            out,
            adapter,
            base_model,
            base_revision=base_revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **hub_arguments,
        )
    elif to == "checkpoint":
        from .checkpoint import write_checkpoint

        if base_model is None:
            base_model, revision = base_model_of(adapter, saved.config)
            base_revision = base_revision or revision
        with atomic_folder(out) as folder:
            write_checkpoint(folder, saved.prompt[0], base_model, base_revision, trust_remote_code)
    else:
        _write_embeddings(out, saved)
    return out


def _write_prefix(out: Path, adapter: str | os.PathLike, base_model: str | None, **options: Any) -> None:
    from safetensors.torch import save_file

    with atomic_folder(out) as folder:
        tuned, _ = load_tuned(adapter, base_model, **options)
        config, weights = stock_adapter(tuned, tuned.active_adapter, as_prefix=True)
        encoder = tuned.prompt_encoder[tuned.active_adapter]
        about = {"format": "pt"} | _posterior(encoder.posterior is not None, encoder.point)
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata=about)
        write_json(folder / ADAPTER_CONFIG, config)


def _write_embeddings(out: Path, saved: SavedAdapter) -> None:
    from safetensors.torch import save_file

    if out.exists():
        raise FileExistsError(f"out must not exist, got {str(out)!r}, where something is")
    if out.suffix != ".safetensors":
        raise ValueError(f"out must be a file that ends in .safetensors for prompt-embeds, got {str(out)!r}")
    about = {"num_virtual_tokens": str(saved.prompt.shape[1])} | _posterior(bool(saved.posterior), saved.point)
    if saved.config.base_model_name_or_path:
        about["base_model"] = saved.config.base_model_name_or_path
    with atomic_path(out) as path:
        save_file({"prompt_embeds": saved.prompt[0].contiguous()}, path, metadata={"format": "pt", **about})


def _posterior(exists: bool, point: Any) -> dict[str, str]:
    """Which prompt of a posterior is written."""
    return {"posterior": "mean" if point is None else "draw"} if exists else {}
