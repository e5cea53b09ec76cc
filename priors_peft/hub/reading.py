"""Files of an adapter: found here or on the Hub, read without running anything, and refused by name if they are unsound."""

import json
import os
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


MAX_JSON_BYTES = 2**24
# Larger than those of any model there is: what declares more was made to exhaust the memory of who loads it.
LIMITS = {
    "num_virtual_tokens": 2**20,
    "token_dim": 2**16,
    "encoder_hidden_size": 2**16,
    "num_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_transformer_submodules": 2,
}
MAX_PROMPT_VALUES = 2**32
NAMES = ("base_model_name_or_path", "tokenizer_name_or_path")


def is_local(model_id: str | os.PathLike) -> bool:
    """Whether `model_id` can only be meant as a folder: a path by its form, or one beside folders that are here."""
    name = os.fspath(model_id)
    if isinstance(model_id, os.PathLike) or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        return True
    return bool(name) and Path(name).parent.is_dir()


def fetch_file(model_id: str | os.PathLike, filename: str, hub_arguments: dict[str, Any]) -> Path | None:
    """Local path of one file of an adapter, or None if the adapter exists without it.

    Raises:
        FileNotFoundError: There is no such folder, or the Hub does not give it.
    """
    folder = Path(model_id, hub_arguments.get("subfolder") or "")
    if folder.is_dir():
        return folder / filename if (folder / filename).is_file() else None
    # Asking the Hub for a mistyped folder would take its retries' half minute and say nothing of the folder.
    if is_local(model_id):
        raise FileNotFoundError(
            f"model_id must be an adapter's folder or a Hub id (user/name), got {str(model_id)!r}: there is no such "
            f"folder{_beside(folder)}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(model_id), filename, **hub_arguments))
    except LocalEntryNotFoundError as error:
        if filename not in _downloaded(str(model_id), hub_arguments, filename):
            return None
        raise FileNotFoundError(
            f"model_id must be a local folder or reachable on the Hub, got {str(model_id)!r}, which is neither here "
            f"nor in the cache, and the Hub can't be reached for {filename}"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"model_id must be an existing folder or a Hub id, got {str(model_id)!r}") from error
    except EntryNotFoundError:
        return None


def _downloaded(model_id: str, hub_arguments: dict[str, Any], otherwise: str) -> set[str]:
    """Files of a repository that was downloaded whole, as by `hf download`; of another it is not known: `otherwise`."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    where = {name: hub_arguments.get(name) for name in ("revision", "cache_dir")}
    subfolder = hub_arguments.get("subfolder")
    try:
        files = {entry.path for entry in get_cached_repo_tree(model_id, **where)}
    except CachedRepoTreeNotFoundError:
        return {otherwise}
    return {path.removeprefix(f"{subfolder}/") for path in files if not subfolder or path.startswith(f"{subfolder}/")}


def required(model_id: str | os.PathLike, filename: str, hub_arguments: dict[str, Any]) -> Path:
    """As `fetch_file`, for a file without which there is no adapter."""
    path = fetch_file(model_id, filename, hub_arguments)
    if path is None:
        raise FileNotFoundError(f"model_id must be an adapter, got {str(model_id)!r}, which has no {filename}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: It is not JSON, not an object, nested too deeply or too large.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} must be at most {MAX_JSON_BYTES:,} bytes, got {size:,}")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def hash_of(described: dict[str, Any], filename: str) -> str | None:
    """SHA-256 that a `prior_config.json` tells of a file beside it; None if it tells none."""
    hashes = described.get("sha256")
    return hashes.get(filename) if isinstance(hashes, dict) else None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; the format's own reader holds declared shapes against the file's size.

    Raises:
        ValueError: It is not a whole safetensors file, or has tensors that PyTorch has no type for.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}") from error


def check_sound(config: dict[str, Any], path: Path, from_hub: bool) -> None:
    """Raise `ValueError` if a configuration asks for code, names files outside its folder, or declares absurd sizes.

    Args:
        config: Fields of `adapter_config.json`, or of the `config` in `prior_config.json`.
        path: The file, for the message.
        from_hub: Whether a stranger wrote it. An absolute path in an adapter on this machine is where the base model
            was when it was trained here; in one from the Hub it can only be wrong.
    """
    if config.get("trust_remote_code"):
        raise ValueError(
            f"trust_remote_code must not be asked for in {path}, got {config['trust_remote_code']!r}: an adapter can't "
            "allow code to run. If the base model needs its own code, pass trust_remote_code yourself"
        )
    for name in NAMES:
        _check_name(name, config.get(name), path, from_hub)
    if not isinstance(config.get("revision"), (str, type(None))):
        raise ValueError(f"revision must be a name in {path}, got {config['revision']!r}")
    for name, limit in LIMITS.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise ValueError(f"{name} must be an integer in [1, {limit:,}] in {path}, got {value!r}")
    values = (config.get("num_virtual_tokens") or 1) * (config.get("token_dim") or 1)
    if values > MAX_PROMPT_VALUES:
        raise ValueError(
            f"num_virtual_tokens and token_dim must make at most {MAX_PROMPT_VALUES:,} values in {path}, got {values:,}"
        )


def _check_name(name: str, value: Any, path: Path, from_hub: bool) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a name in {path}, got {value!r}")
    if ".." in value.replace("\\", "/").split("/"):
        raise ValueError(f"{name} must not lead out of its folder in {path}, got {value!r}")
    if from_hub and (value.startswith(("/", "~", "\\")) or PureWindowsPath(value).drive):
        raise ValueError(
            f"{name} must be a Hub id in {path}, got the path {value!r}, which is on its author's machine: ask them to "
            "name the model, or download the folder and put the right name there"
        )


def _beside(folder: Path) -> str:
    """What is there instead, for a folder whose name was mistyped."""
    import difflib

    names = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, 1)
    return f"; did you mean {str(folder.parent / near[0])!r}?" if near else ""
