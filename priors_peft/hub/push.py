"""Pushing an adapter's folder to the Hub in one commit, so that a failure costs nothing but another try."""

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..files import atomic_path, sha256
from ..snapshots import SNAPSHOTS
from .adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS, TASK_FILE
from .base_model import BUNDLED
from .card import ANALYSIS, CARD, EVALUATION, MARK, adapters_in, card_text, own_part, write_card
from .facts import TRAINING, public_name, read_facts
from .markdown import scrub


# What is shared, by name: a folder of a run also holds logs, checkpoints, a tokenizer and states with names of a machine.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, PRIOR_CONFIG, PRIOR_WEIGHTS, SNAPSHOTS, TASK_FILE)
ROOT_FILES = (*ADAPTER_FILES, TRAINING, EVALUATION, ANALYSIS, "report.html", "*.png", CARD)

_ANSWERS = {
    400: "it did not understand the request",
    401: "you are not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN",
    403: "your token may not write there: take one with write access to the repository's owner",
    404: "there is no such repository or revision, or your token may not see it",
    409: "it conflicts with what somebody else did there at the same time",
    412: "it conflicts with what somebody else did there at the same time",
    413: "a file or the commit is too large for it",
    429: "too many requests",
}


class PushError(OSError):
    """A push failed; the message says why, what is left, and the command that tries again."""


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload adapter with priors_peft",
    again: str | None = None,
    **card_options: Any,
) -> tuple[CommitInfo, bool]:
    """Push an adapter with sidecars, analysis, pictures and a fresh card in one commit.

    What the Hub has already is not sent again, neither in a second push nor in one after a failure.

    Args:
        folder: An adapter's folder.
        repo_id: `"user/name"`; it is made if it is not there.
        private: Whether a new repository is private.
        revision: Branch, made from `main` if it is not there.
        token: Of the Hub; else the one that is stored or in HF_TOKEN.
        message: Of the commit.
        again: How to try again after a failure, if not by `priors-peft push`.
        **card_options: `license` and the like for `card_text`.

    Returns:
        The commit, and whether it is new: it is the present one where nothing has changed.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A file of the adapter is damaged.
        PushError: The Hub or the network failed.
    """
    folder = Path(folder)
    check_whole(folder)
    api = HfApi(token=token, library_name="priors_peft")
    with explained(folder, repo_id, private, revision, again, **card_options):
        repo_id = prepare_repo(api, repo_id, private, revision)
        adopt_card(api, repo_id, revision, folder)
        _fetch_base_card(api, folder)
        facts = read_facts(folder)
        if (folder / TRAINING).is_file() and facts.repo_id != repo_id:
            facts.repo_id = repo_id
            facts.save(folder)
        write_card(folder, repo_id=repo_id, **card_options)
        return commit(api, repo_id, files_of(folder), message, revision)


def commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], message: str, revision: str | None
) -> tuple[CommitInfo, bool]:
    """Commit files by their path in the repository; returns the commit and whether it is new."""
    before = api.repo_info(repo_id, revision=revision).sha
    additions = [
        CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in files.items()
    ]
    done = api.create_commit(repo_id, additions, commit_message=message, revision=revision)
    return done, done.oid != before


def prepare_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make repository and branch if they are not there; returns the repository's whole id."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"private must be left out for a repository that is there already, got True, but {repo_id} is public. Make "
            "it private in its settings first"
        )
    if revision not in (None, constants.DEFAULT_REVISION) and not str(revision).startswith("refs/"):
        api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    return repo_id


def adopt_card(api: HfApi, repo_id: str, revision: str | None, folder: Path) -> None:
    """Take over what its author wrote into the card on the Hub, where the card here has no such part."""
    path = folder / CARD
    if own_part(path)[1].strip():
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            there = Path(api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=place))
        except EntryNotFoundError:
            return
        own = own_part(there)[1]
        if own.strip():
            here = path.read_text(encoding="utf-8") if path.is_file() else ""
            text = here + own if MARK in here else there.read_text(encoding="utf-8")
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _fetch_base_card(api: HfApi, folder: Path) -> None:
    """Have the base model's card in the cache, where `card_text` finds its licence."""
    stock = next(iter(adapters_in(folder).values()))[1]
    base = public_name(stock.get("base_model_name_or_path"))
    if base and base != BUNDLED:
        with suppress(HTTPError, OSError, HFValidationError):  # a card without a licence is a card
            api.hf_hub_download(base, CARD, revision=stock.get("revision"))


def check_whole(folder: Path) -> None:
    """Raise unless the folder holds an adapter whose weights are those that were saved."""
    for name, (own, _, described) in adapters_in(folder).items():
        for file in (ADAPTER_WEIGHTS, *([PRIOR_WEIGHTS] if described else [])):
            path = folder / own / file
            if not path.is_file():
                raise FileNotFoundError(f"the adapter {name!r} must have {file}, got {str(folder / own)!r} without it")
            if described and described.get("sha256", {}).get(file) != sha256(path):
                raise ValueError(
                    f"{path} is damaged or was changed after it was saved (its SHA-256 is not the one in {PRIOR_CONFIG}): "
                    "save the adapter again"
                )


def files_of(folder: Path, repo_id: str | None = None, **card_options: Any) -> dict[str, Path | bytes]:
    """What is pushed of a folder, by path in the repository: files, or the contents of those that name this machine.

    Args:
        folder: An adapter's folder.
        repo_id: If given, the card is made for it, and not written.
        **card_options: As in `card_text`.
    """
    found: dict[str, Path | bytes] = {}
    for own, stock, _ in adapters_in(folder).values():
        base = public_name(stock.get("base_model_name_or_path"))
        for pattern in ROOT_FILES if not own else ADAPTER_FILES:
            for path in sorted((folder / own).glob(pattern)):
                found[f"{own}/{path.name}" if own else path.name] = _public(path, base)
    for pattern in ROOT_FILES:
        for path in sorted(folder.glob(pattern)):
            found.setdefault(path.name, _public(path, None))
    if repo_id is not None:
        found[CARD] = card_text(folder, repo_id=repo_id, **card_options).encode()
    return dict(sorted(found.items()))


def _public(path: Path, base: str | None) -> Path | bytes:
    """The file, or its content with the base model's name in place of a folder here."""
    if path.suffix != ".json":
        return path
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    named = [value, value.get("config"), *(value.get("reference") or [])]
    for entry in (entry for entry in named if isinstance(entry, dict)):
        for key in ("base_model_name_or_path", "base_model", "model"):
            if isinstance(entry.get(key), str):
                # One place to mend: the name in adapter_config.json is also that of the prior's configuration.
                entry[key] = base if key == "base_model_name_or_path" else public_name(entry[key])
    clean = scrub(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return path if json.loads(text) == json.loads(clean) else clean.encode()


def retry_command(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    license: str | None = None,
    language: str | None = None,
    model_name: str | None = None,
    **_: Any,
) -> str:
    """The command that pushes a folder again, with all of it that a command can say."""
    words = ["priors-peft", "push", str(folder), repo_id]
    words += ["--private"] if private else []
    named = {"revision": revision, "license": license, "language": language, "model_name": model_name}
    words += [word for name, value in named.items() if value for word in (f"--{name}", str(value))]
    return shlex.join(words)


@contextmanager
def explained(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    again: str | None = None,
    **card_options: Any,
) -> Iterator[None]:
    """Turn what the Hub and the network raise into a `PushError` that says what to do: `again`, or push again."""
    try:
        yield
    except HFValidationError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        command = retry_command(folder, repo_id, private, revision, **card_options)
        again = again or f"The folder is whole; to try again: {command}"
        raise PushError(f"{str(folder)!r} was not pushed to {repo_id}: {what_happened(error)}. {again}") from error


def what_happened(error: Exception) -> str:
    """Why a request to the Hub failed, in words."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client says which file, its cause says why
    response = getattr(error, "response", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing may be asked of the Hub: unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: run `hf auth login`, or set HF_TOKEN"
    if response is not None:
        status = response.status_code
        meaning = _ANSWERS.get(status, "it failed itself, which passes" if status >= 500 else response.reason_phrase)
        after = response.headers.get("Retry-After")
        wait = f"; wait {after} seconds" if after else ""
        said = getattr(error, "server_message", None)
        return f"the Hub answered {status}: {meaning}{wait}" + (f" (it says: {said})" if said else "")
    if isinstance(error, HTTPError):
        kind = type(error).__name__
        if kind.startswith("Connect"):
            return f"the Hub can't be reached at {constants.ENDPOINT}: check the network ({error})"
        return f"the connection to the Hub was cut ({kind}: {error})"
    return str(error).rstrip(".")
