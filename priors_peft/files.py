"""Files that are never half written: everything goes to a temporary name first and is renamed into place."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error `path` is left as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    # mkstemp and safetensors make files only their owner can read; a shared one gets what `open` would have given it.
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` on success; on any error nothing is left of it.

    Raises:
        FileExistsError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"out must not exist or be an empty folder, got {str(folder)!r}, where something is")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        temporary.chmod(0o777 & ~umask)
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_dir() -> Path:
    """Folder of what is made once and kept: `PRIORS_PEFT_CACHE`, or `~/.cache/priors_peft`."""
    return Path(os.environ.get("PRIORS_PEFT_CACHE") or "~/.cache/priors_peft").expanduser()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(
    folder: str | os.PathLike, needed_bytes: int, argument: str = "output_dir", done: str = "trained"
) -> None:
    """Raise `OSError` unless `folder` can be written to and has room, so that hours of training are not lost at save.

    Args:
        folder: The folder that will be written to; made if it does not exist.
        needed_bytes: How much will be written; one probe file of up to that size (at most 64 MiB) is really written,
            because quotas and some network disks only say no then.
        argument: What the folder was given as.
        done: What would be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * min(needed_bytes, 64 * 2**20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"{argument} must be writable with {needed_bytes / 2**20:.1f} MiB free, got {str(folder)!r} "
            f"({error.strerror}). Free some space or pass another {argument}; nothing was {done}",
        ) from error
