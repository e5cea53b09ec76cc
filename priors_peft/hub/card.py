"""The model card: `README.md` from the facts that lie in an adapter's folder, by one template."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import atomic_path
from .adapter import ADAPTER_CONFIG, PRIOR_CONFIG, PRIOR_WEIGHTS, TASK_FILE, read_json
from .base_model import BUNDLED
from .facts import TRAINING, TrainingFacts, public_name, read_facts
from .markdown import plain, scrub, slug
from .reading import hash_of


logger = logging.getLogger(__name__)

CARD, TEMPLATE = "README.md", "card.md"
ANALYSIS, EVALUATION = "analysis.json", "evaluation.json"
MARK = "<!-- Write below this line: priors_peft keeps it when it makes this card again. -->"
# Cards that nobody wrote: what Trainer and PEFT leave.
_GENERATED = ("[More Information Needed]", "has been generated automatically according to the information the Trainer")
_OWN_KEYS = {"base_model", "base_model_relation", "datasets", "library_name", "pipeline_tag", "tags", "model-index"}


@dataclass
class Facts:
    """All that lies in an adapter's folder and that its card can tell.

    Args:
        folder: The folder.
        adapters: By name: its subfolder ("" at the root), `adapter_config.json` and `prior_config.json` (empty if stock).
        training: From `training.json`.
        task: From `task.json`; empty if nothing is said.
        evaluation: From `evaluation.json`, what `priors-peft evaluate` measured; empty if it did not, or of another prompt.
        analysis: From `analysis.json`; empty if there is none.
        pictures: Names of PNG files at the root.
        repo_id: Where the folder is on the Hub.
    """

    folder: Path
    adapters: dict[str, tuple[str, dict[str, Any], dict[str, Any]]]
    training: TrainingFacts
    task: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    analysis: dict[str, Any] = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    repo_id: str | None = None

    @property
    def name(self) -> str:
        """The adapter that the card is about: the one at the root, or the first."""
        return next(iter(self.adapters))

    @property
    def stock(self) -> dict[str, Any]:
        """Its `adapter_config.json`."""
        return self.adapters[self.name][1]

    @property
    def described(self) -> dict[str, Any]:
        """Its `prior_config.json`; empty for a stock adapter."""
        return self.adapters[self.name][2]

    @property
    def sha256(self) -> str | None:
        """Of its `prior.safetensors`; None for a stock adapter."""
        return hash_of(self.described, PRIOR_WEIGHTS)

    @property
    def config(self) -> dict[str, Any]:
        """Its `PriorConfig`; empty for a stock adapter."""
        return self.described.get("config", {})

    @property
    def base_model(self) -> str | None:
        """The base model's Hub id or the bundled model's name; None where it is a folder."""
        return self.training.base_model or public_name(self.stock.get("base_model_name_or_path"))

    @property
    def deep(self) -> bool:
        """Whether it is a deep prompt."""
        return self.stock.get("peft_type") == "PREFIX_TUNING"


def read_folder(folder: str | os.PathLike, repo_id: str | None = None) -> Facts:
    """What an adapter's folder tells.

    Raises:
        FileNotFoundError: There is no adapter in it.
        ValueError: A file is damaged.
    """
    folder = Path(folder)
    adapters = adapters_in(folder)
    training = read_facts(folder)
    # A checkpoint is of the same task as the run it lies in.
    places = [folder, folder.resolve().parent] if folder.resolve().name.startswith("checkpoint-") else [folder]
    task = next((place / TASK_FILE for place in places if (place / TASK_FILE).is_file()), None)
    evaluation, own = _read(folder / EVALUATION), adapters.get("default", ("", {}, {}))[2]
    return Facts(
        folder,
        adapters,
        training,
        task=read_json(task) if task else {},
        evaluation=evaluation if evaluation.get("sha256") in (None, hash_of(own, PRIOR_WEIGHTS)) else {},
        analysis=_read(folder / ANALYSIS),
        pictures=sorted(path.name for path in folder.glob("*.png")),
        repo_id=repo_id or training.repo_id,
    )


def adapters_in(folder: Path) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """The adapter at a folder's root and those in its subfolders, as `save_pretrained` leaves them.

    A subfolder with facts of a training of its own is no part of this one.

    Raises:
        FileNotFoundError: There is none.
    """
    found, runs = {}, []
    inner = sorted(path for path in folder.glob("*/") if not path.name.startswith((".", "checkpoint-")))
    for place in [folder, *inner]:
        own = "" if place == folder else place.name
        if own and (place / TRAINING).is_file() and (place / ADAPTER_CONFIG).is_file():
            runs.append(own)
        elif (place / ADAPTER_CONFIG).is_file():
            found[own or "default"] = own, read_json(place / ADAPTER_CONFIG), _read(place / PRIOR_CONFIG)
    if not found:
        below = f"; it holds the runs {', '.join(runs)}, each an adapter of its own" if runs else ""
        raise FileNotFoundError(
            f"the folder must hold an adapter, got {str(folder)!r} without {ADAPTER_CONFIG}: give the output_dir of "
            f"`priors-peft train`, or what save_pretrained wrote{below}"
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def write_card(folder: str | os.PathLike, **options: Any) -> Path:
    """Write `README.md` into an adapter's folder; what stands below the marked line of the present one is kept.

    Args:
        folder: The adapter's folder.
        **options: As in `card_text`.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A file the card is made from is damaged.
    """
    from .card_posterior import draw_reliability

    path = Path(folder, CARD)
    draw_reliability(read_folder(folder))
    text = card_text(folder, **options)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


def card_text(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    license: str | None = None,
    language: str | None = None,
    tags: list[str] | str | None = None,
    model_name: str | None = None,
) -> str:
    """The card of an adapter's folder, front matter and all.

    Args:
        folder: The adapter's folder.
        repo_id: Where it is or will be on the Hub.
        license: Its licence as the Hub names them; else what the present card says, else the base model's.
        language: Of the data; else what the present card says.
        tags: More tags.
        model_name: The title; else the repository's name, or what it is.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: A file the card is made from is damaged.
    """
    from huggingface_hub import ModelCard

    from . import card_parts as parts

    facts = read_folder(folder, repo_id)
    old_data, own_text = own_part(Path(folder, CARD))
    try:
        title = plain(model_name or (facts.repo_id or "").rpartition("/")[2] or parts.title(facts))
        data, sections = parts.front_matter(facts, title), parts.sections(facts, title)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the JSON files in {str(folder)!r} must be as priors_peft writes them, got {type(error).__name__}: {error}"
        ) from error
    given = [tags] if isinstance(tags, str) else tags or []
    kept_tags = [tag for tag in old_data.get("tags") or [] if not str(tag).startswith(("prior:", "task:"))]
    data.tags = list(dict.fromkeys([*(data.tags or []), *map(slug, given), *kept_tags]))
    if license is not None and old_data.get("license") not in (None, license):
        old_data = {key: value for key, value in old_data.items() if key not in ("license_name", "license_link")}
    given_data = {"license": license, "language": language}
    own = old_data | {name: value for name, value in given_data.items() if value is not None}
    for name, value in (own if own.get("license") else base_licence(facts) | own).items():
        if name not in _OWN_KEYS and value is not None:
            data[name] = value
    card = ModelCard.from_template(
        data,
        template_str=Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"),
        **sections,
    )
    return scrub(str(card).rstrip()) + f"\n\n{MARK}\n{own_text}"


def base_licence(facts: Facts) -> dict[str, Any]:
    """The licence of the base model in front matter, as its own card has it; empty where that card is not here.

    It is looked for in the base model's folder and in the Hub's cache; a push puts it there.
    """
    import yaml
    from huggingface_hub import metadata_load, try_to_load_from_cache

    if facts.base_model == BUNDLED:
        return {"license": "apache-2.0"}
    base = facts.stock.get("base_model_name_or_path") or ""
    path: Any = Path(base, CARD) if base else None
    if facts.base_model and not (path and path.is_file()):
        path = try_to_load_from_cache(facts.base_model, CARD, revision=facts.stock.get("revision"))
    if not (isinstance(path, (str, Path)) and Path(path).is_file()):  # None, or a mark that the repository has none
        return {}
    try:
        data = metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("The licence of %s can't be read (%s); the card names none", facts.base_model or base, error)
        return {}
    found = {name: plain(data[name]) for name in ("license", "license_name", "license_link") if data.get(name)}
    if "://" not in found.get("license_link", "://"):
        del found["license_link"]  # a file beside that model
    return found


def own_part(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter of a card and the part of it that its author wrote; empty where there is none."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8")
    try:
        card = ModelCard(text, ignore_metadata_errors=True)
        data, body = card.data.to_dict(), card.text
    except Exception as error:  # whatever a YAML parser says of what people write
        logger.warning("The front matter of %s can't be read (%s); it is made anew", path, error)
        data, body = {}, text
    before, mark, own = text.partition(f"{MARK}\n")
    if mark:
        return data, own
    if any(sign in text for sign in _GENERATED) or not body.strip():
        return {}, ""
    return data, f"\n{body.lstrip()}"
