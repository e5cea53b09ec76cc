"""The adapters that an analysis is of: read, named, checked to belong together."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import PriorConfig
from ..fitting import new_encoder
from ..hub.adapter import ADAPTER_CONFIG, PRIOR_CONFIG, PRIOR_WEIGHTS, SavedAdapter, read_adapter
from ..hub.reading import fetch_file, hash_of, read_json
from ..priors import Prior
from ..snapshots import SNAPSHOTS, read_snapshots


logger = logging.getLogger(__name__)

# A prompt that was saved again on another device differs in its last digits.
_SAME = 1e-5


@dataclass
class Source:
    """One adapter of an analysis.

    Attributes:
        name: The folder's name or the Hub id, with as many parents as tell it from the others.
        path: Where it was read from.
        saved: What it holds.
        has_prior: False for a stock PEFT prompt, whose prior and start nobody knows.
        sha256: Of its `prior.safetensors`; None for a stock prompt.
        steps: Training step of each snapshot, the last the prompt's own; None where it is not known.
        trajectory: The snapshots, shape `[T, S, P, d]`; the prompt alone where there are none.
    """

    name: str
    path: str
    saved: SavedAdapter
    has_prior: bool
    sha256: str | None
    steps: list[int | None]
    trajectory: Tensor

    @property
    def prompt(self) -> Tensor:
        """θ, shape `[S, P, d]`."""
        return self.saved.prompt

    @property
    def initial(self) -> Tensor | None:
        """θ before training, shape `[S, P, d]`, where it is known."""
        return self.saved.initial_prompt if self.has_prior else None

    @property
    def layers(self) -> list[int]:
        """The selected layers."""
        return self.saved.config.selected_layers(self.saved.config.num_layers or 1)

    def priors(self, model: Any, tokenizer: Any) -> list[Prior]:
        """One prior for each layer: the adapter's, or, where it has none, one fitted on the vocabulary."""
        if self.has_prior:
            return self.saved.priors
        count, width = self.prompt.shape[1:]
        config = PriorConfig(num_virtual_tokens=count, token_dim=width, prior="structured")
        return list(new_encoder(model, config, [0], tokenizer)[0].priors)


def read_sources(adapters: Sequence[str | os.PathLike]) -> list[Source]:
    """Read adapters, local folders or on the Hub; sorted by name, so that nothing hangs on their order.

    Raises:
        FileNotFoundError: One is no adapter.
        ValueError: None are given, one is given twice, is damaged or has no vectors to analyse, or they belong to
            different base models.
    """
    if isinstance(adapters, (str, os.PathLike)) or not len(adapters):
        raise ValueError(f"adapters must be a list of at least one folder or Hub id, got {adapters!r}")
    names = unique_names(list(map(str, adapters)))
    sources = sorted((_read(str(path), name) for path, name in zip(adapters, names, strict=True)), key=_name)
    _check_one_base(sources)
    return sources


def base_model_of(sources: Sequence[Source]) -> tuple[str | None, str | None]:
    """Name and revision of the base model that all sources were trained on, as far as they say."""
    configs = [source.saved.config for source in sources]
    name = next((config.base_model_name_or_path for config in configs if config.base_model_name_or_path), None)
    return name, next((config.revision for config in configs if config.revision), None)


def _name(source: Source) -> str:
    return source.name


def unique_names(adapters: list[str]) -> list[str]:
    """The last part of each path, or the Hub id; with as many parents as make them different."""
    parts = [Path(adapter).resolve().parts if Path(adapter).is_dir() else (adapter,) for adapter in adapters]
    twice = [adapter for adapter, part in zip(adapters, parts, strict=True) if parts.count(part) > 1]
    if twice:
        raise ValueError(f"adapters must be different, got {twice[0]!r} twice")
    counts = [1] * len(parts)
    while True:
        names = ["/".join(part[-count:]) for part, count in zip(parts, counts, strict=True)]
        often = Counter(names)
        if max(often.values()) == 1:
            return names
        counts = [
            min(count + (often[name] > 1), len(part)) for count, name, part in zip(counts, names, parts, strict=True)
        ]


def _read(path: str, name: str) -> Source:
    described = fetch_file(path, PRIOR_CONFIG, {})
    has_prior = described is not None
    stock = fetch_file(path, ADAPTER_CONFIG, {})
    if not has_prior and stock is not None and read_json(stock).get("peft_type") == "PREFIX_TUNING":
        raise ValueError(
            f"adapter {name!r} must hold vectors in the model's own spaces, got a stock PREFIX_TUNING one: keys and "
            f"values lie in no vocabulary, so neither tokens nor geometry apply. Deep prompts saved by priors_peft keep "
            f"their vectors beside {PRIOR_CONFIG}"
        )
    saved = read_adapter(path)
    steps, trajectory = _trajectory(path, name, saved.prompt)
    sha256 = None if described is None else hash_of(read_json(described), PRIOR_WEIGHTS)
    return Source(name, path, saved, has_prior, sha256, steps, trajectory)


def _trajectory(path: str, name: str, prompt: Tensor) -> tuple[list[int | None], Tensor]:
    file = fetch_file(path, SNAPSHOTS, {})
    if file is not None:
        steps, prompts = read_snapshots(file)
        if prompts.shape[1:] == prompt.shape:
            same = (prompts - prompt).abs().flatten(1).amax(1) <= _SAME * prompt.abs().max()
            if same.any():
                end = int(same.nonzero()[-1])
                return list(steps[: end + 1]), torch.cat([prompts[:end], prompt[None]])
        logger.warning("%s of %s is of another prompt: the course of training is left out", SNAPSHOTS, name)
    return [None], prompt[None]


def _check_one_base(sources: list[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        one, two = (source.saved.config for source in (first, other))
        for what, a, b in (
            ("base model", _place(one.base_model_name_or_path), _place(two.base_model_name_or_path)),
            ("base model's revision", one.revision, two.revision),
            ("width", one.token_dim, two.token_dim),
        ):
            if a and b and a != b:
                raise ValueError(
                    f"adapters must have one {what}, got {a} of {first.name!r} and {b} of {other.name!r}: their vectors "
                    "lie in different spaces. Analyse them apart"
                )


def _place(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
