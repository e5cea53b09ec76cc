"""An adapter by its name alone: its base model is found from it, and the two become a model or a pipeline."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .base_model import load_base_model


if TYPE_CHECKING:
    import torch
    from transformers import Pipeline, PreTrainedTokenizerBase

    from ..config import PriorConfig
    from ..model import PriorPeftModel


def base_model_of(adapter: str | os.PathLike, config: PriorConfig) -> tuple[str, str | None]:
    """Name and revision of the base model that an adapter was trained on.

    Raises:
        ValueError: The adapter names none.
    """
    if not config.base_model_name_or_path:
        raise ValueError(
            f"base_model must be given for {str(adapter)!r}, whose adapter_config.json names no "
            "base_model_name_or_path: a Hub id or a folder"
        )
    return config.base_model_name_or_path, config.revision


def load_tuned(
    adapter: str | os.PathLike,
    base_model: str | None = None,
    *,
    base_revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **hub_arguments: Any,
) -> tuple[PriorPeftModel, PreTrainedTokenizerBase]:
    """Load an adapter onto its base model, in evaluation mode, with the base model's tokenizer.

    Args:
        adapter: A local folder or a Hub id.
        base_model: As in `load_base_model`; by default what the adapter names.
        base_revision: Branch, tag or commit of the base model; by default what the adapter names.
        dtype: As in `load_base_model`.
        device: As in `load_base_model`.
        trust_remote_code: Allow the base model to run its own code; an adapter can't ask for it.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... of the adapter; the last two of the base
            model too.

    Raises:
        FileNotFoundError: There is no adapter of that name.
        OSError: The base model is neither in the cache nor within reach.
        ValueError: The adapter is damaged or unsound, names no base model, or does not fit it.
    """
    from ..model import PriorPeftModel
    from .adapter import read_adapter

    saved = read_adapter(adapter, **hub_arguments)
    if base_model is None:
        base_model, revision = base_model_of(adapter, saved.config)
        base_revision = base_revision or revision
        named = f". The adapter {str(adapter)!r} names this base model; pass base_model= to use another."
    else:
        named = ""
    shared = {name: hub_arguments[name] for name in ("token", "cache_dir") if name in hub_arguments}
    try:
        base, tokenizer = load_base_model(
            base_model,
            dtype=dtype,
            device=device,
            revision=base_revision,
            trust_remote_code=trust_remote_code,
            **shared,
        )
    except OSError as error:
        raise (FileNotFoundError if isinstance(error, FileNotFoundError) else OSError)(f"{error}{named}") from error
    return PriorPeftModel.from_pretrained(base, os.fspath(adapter), **hub_arguments), tokenizer


def pipeline(
    task: str,
    model: str | os.PathLike,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Pipeline:
    """`transformers.pipeline` for an adapter, which stock `transformers` refuses for prompts.

    ```python
    generator = priors_peft.pipeline("text-generation", "user/adapter")
    generator("3 and 4 make", max_new_tokens=3)
    ```

    Args:
        task: `"text-generation"`.
        model: The adapter: a local folder or a Hub id.
        base_model: A Hub id, a folder or `"bundled:smollm2-135m"`; by default what the adapter names.
        base_revision: Branch, tag or commit of the base model; by default what the adapter names.
        dtype: Of the base model; by default float32 on a CPU and the checkpoint's own elsewhere.
        device: By default the accelerator if there is one.
        revision: Branch, tag or commit of the adapter.
        subfolder: Where in its repository the adapter lies.
        token: For the Hub.
        cache_dir: For the Hub.
        trust_remote_code: Allow the base model to run its own code.
        **kwargs: For `transformers.pipeline`: `batch_size`, `max_new_tokens`, ...

    Raises:
        ValueError: Another task, or as `load_tuned`.
        FileNotFoundError: There is no adapter of that name.
        OSError: The base model is neither in the cache nor within reach.
    """
    if task != "text-generation":
        raise ValueError(f'task must be "text-generation", which is what prompts are tuned for here, got {task!r}')
    import transformers

    from ..evaluation import best_device

    device = best_device() if device is None else device
    given = {"revision": revision, "subfolder": subfolder, "token": token, "cache_dir": cache_dir}
    tuned, tokenizer = load_tuned(
        model,
        base_model,
        base_revision=base_revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        **{name: value for name, value in given.items() if value is not None},
    )
    kwargs.setdefault("tokenizer", tokenizer)
    return transformers.pipeline(task, model=tuned, device=device, **kwargs)
