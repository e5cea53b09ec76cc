"""Everything that is known of some adapters as one dictionary, `analysis.json`: docs/analysis.md says what it holds."""

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..hub.adapter import read_task
from ..inference.posterior import MixturePosterior
from ..names import check_at_least, check_choice
from ..priors import prior_family
from .common import check_installed, plain
from .geometry import geometry_series, token_geometry
from .languages import language_signal, word_reader
from .members import Member, Null, Space, prior_digest, random_prompts, spaces_of
from .posterior import (
    initial_deviation,
    kl_divergence,
    local_variance,
    nearest_agreement,
    posterior_draws,
    posterior_spread,
)
from .projected import project
from .runs import stability, word_odds
from .sources import Source, base_model_of, read_sources
from .tokens import METRICS, NearestTokens, nearest_tokens, token_changes, token_signal
from .words import script, script_shares, show_token, token_text


FORMAT_VERSION = 1
PACKAGES = ("priors_peft", "torch", "transformers", "peft", "numpy", "scipy", "scikit-learn", "py3langid")


def analyze(
    adapters: Sequence[str | os.PathLike],
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any] | None = None,
    *,
    k: int = 10,
    metric: str = "cosine",
    num_draws: int = 200,
    seed: int = 0,
    level: float = 0.05,
    describe: bool = False,
    umap: bool = False,
    activation_layers: Sequence[int] | None = None,
    loss_rows: int | None = None,
    batch_size: int = 16,
    command: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Analyse adapters of one base model: tokens, geometry and projections; more with data or with several adapters.

    The result depends on neither the order of the adapters nor, beyond rounding, the batch size, and is the same for
    the same seed but for `created`.

    Args:
        adapters: Local folders or Hub ids.
        model: Their base model.
        tokenizer: Its tokenizer.
        tasks: Held-out rows (`prompt`, `completion`) by task, in which faithfulness and lines between runs are
            measured: each adapter on its own task if it is there, else on the first. Two or more tasks are compared
            by their activations.
        k: Nearest tokens of each virtual token.
        metric: `"cosine"`, `"l2"` or `"dot"`.
        num_draws: Prompts drawn from each prior as a null.
        seed: Of draws, samples and projections.
        level: Of signal, see `tokens.token_signal`.
        describe: Whether the model describes each prompt in its own words.
        umap: Whether to project by UMAP too, which needs `umap-learn`.
        activation_layers: Where tasks are compared; a third and two thirds of the depth, and the end, if None.
        loss_rows: Most rows of a task, spread over it, that losses are measured on; all if None. Each virtual token and
            each line between runs takes a pass over them, while activations take one over all rows.
        batch_size: Rows at once.
        command: What to say the analysis was made by.
        progress: Whether to show a bar.

    Returns:
        A dictionary that JSON takes; docs/analysis.md has its schema.

    Raises:
        FileNotFoundError: An adapter is none.
        ImportError: `py3langid` is not installed, or `umap-learn` where it is asked for.
        ValueError: An argument is not valid, a task has no rows, or adapters don't fit the model or one another.
    """
    check_choice("metric", metric, METRICS)
    check_at_least("k", k, 1)
    check_at_least("num_draws", num_draws, 19, "fewer can't show signal at 5 %")
    check_installed("analyze", ["py3langid"])
    if umap:
        check_installed("UMAP", ["umap"], "umap-learn")
    sources = read_sources(adapters)
    for source in sources:
        source.saved.check_fits(model)
    for name, rows in (tasks or {}).items():
        check_at_least(
            f"the number of evaluation rows of task {name!r}", len(rows), 1, "pass data that holds some out"
        )
    with tqdm(total=len(sources) + 3, desc="Analysing", disable=not progress, leave=False) as bar:
        spaces = spaces_of(model, tokenizer, sources, seed)
        nulls: dict[tuple[str, int, int], Null] = {}
        members, entries, word_of = [], [], word_reader(tokenizer)
        for source in sources:
            bar.set_postfix_str(source.name)
            member = _member(source, nulls, spaces, model, tokenizer, k, metric, num_draws, seed)
            tokens = _tokens(member, spaces[0], tokenizer, word_of, level)
            entry = _entry(member, tokens, _geometry(member, spaces, seed))
            entries.append(entry | {"posterior": _posterior(member, spaces[0], seed)})
            members.append(member)
            bar.update()
        bar.set_postfix_str("projections")
        projection = project(members, spaces[0], tokenizer, tasks or {}, seed, umap)
        bar.update()
        left_out = {"transfer": "priors-peft transfer measures it"}
        words = word_odds(members, spaces[0], tokenizer, k, metric, left_out)
        bar.set_postfix_str("tasks")
        activations, on_tasks = None, None
        if tasks or describe:
            from .on_tasks import OnTasks

            on_tasks = OnTasks(members, model, tokenizer, tasks or {}, batch_size, loss_rows)
            entries = [entry | on_tasks.of_adapter(index, describe) for index, entry in enumerate(entries)]
        if on_tasks is not None and tasks:
            activations = on_tasks.activations(activation_layers, seed, left_out)
        else:
            left_out |= dict.fromkeys(("faithfulness", "activations"), "no task was given")
        bar.update()
        bar.set_postfix_str("runs")
        runs = stability(members, on_tasks if tasks else None, seed, left_out)
        bar.update()
    return plain(
        {
            "format_version": FORMAT_VERSION,
            "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command,
            "base_model": public_name(base_model_of(sources)[0] or getattr(model, "name_or_path", None)),
            "level": level,
            "num_draws": num_draws,
            "seed": seed,
            "adapters": entries,
            "projection": projection,
            "activations": activations,
            "words": words,
            "stability": runs,
            "transfer": None,
            "questions": None,
            "left_out": left_out,
        }
    )


def public_name(name: str | None) -> str | None:
    """A model's name without the folders of this machine."""
    return Path(name).name if name and Path(name).is_dir() else name


# One adapter.


def _member(
    source: Source,
    nulls: dict[tuple[str, int, int], Null],
    spaces: dict[int, Space],
    model: Any,
    tokenizer: Any,
    k: int,
    metric: str,
    num_draws: int,
    seed: int,
) -> Member:
    """An adapter with its priors, random prompts and nearest tokens; adapters under one prior share their `nulls`."""
    priors, count, own = source.priors(model, tokenizer), source.prompt.shape[1], []
    for layer, prior in zip(source.layers, priors, strict=True):
        key = (prior_digest(prior), layer, count)
        if key not in nulls:
            nulls[key] = random_prompts(prior, count, layer, spaces[layer], metric, num_draws, seed)
        own.append(nulls[key])
    near = nearest_tokens(source.prompt[0], spaces[0].vectors, k, metric, spaces[0].excluded)
    drawn = posterior_draws(source.saved.encoder(), seed)
    return Member(source, priors, own, near, read_task(source.path) or {}, drawn)


def _entry(member: Member, tokens: dict[str, Any], geometry: dict[str, Any]) -> dict[str, Any]:
    source, config = member.source, member.source.saved.config
    deep = [layer for layer in source.layers if layer]
    return {
        "name": source.name,
        "source": Path(source.path).resolve().name if Path(source.path).is_dir() else source.path,
        "sha256": source.sha256,
        "tuning": config.tuning,
        "prior": prior_family(member.priors[0]),
        "prior_source": "adapter" if source.has_prior else "fitted for the analysis",
        "num_virtual_tokens": source.prompt.shape[1],
        "layers": source.layers,
        "parts": "tokens and geometry"
        + (
            f"; tokens of the embedding layer only: layers {', '.join(map(str, deep))} have no vocabulary"
            if deep
            else ""
        ),
        "task": member.task,
        "steps": source.steps[-1],
        "tokens": tokens,
        "geometry": geometry,
        "faithfulness": None,
        "description": None,
    }


def _tokens(
    member: Member, space: Space, tokenizer: Any, word_of: Callable[[int], str | None], level: float
) -> dict[str, Any]:
    near, source = member.near, member.source
    start = changes = None
    if source.initial is not None:
        k = near.ids.shape[1]
        start = nearest_tokens(source.initial[0], space.vectors, k, near.metric, space.excluded)
        changes = token_changes(start, near)
    loc = member.priors[0].loc.expand(len(near.ids), -1)
    centre = nearest_tokens(loc, space.vectors, 1, near.metric, space.excluded)
    signal = token_signal(near, member.nulls[0].scores, start, level, centre)

    def listed(found: NearestTokens, index: int) -> list[dict[str, Any]]:
        pairs = zip(found.ids[index].tolist(), found.scores[index].tolist(), strict=True)
        return [{"id": token, "text": show_token(tokenizer, token), "score": score} for token, score in pairs]

    def words(ids: Tensor) -> list[str]:
        return [word for word in map(word_of, ids.tolist()) if word]

    def texts(ids: list[list[int]], index: int) -> list[str]:
        return [show_token(tokenizer, token) for token in ids[index]]

    found = signal.to_dict()
    languages = language_signal(
        words(near.ids[:, 0]),
        list(map(words, member.nulls[0].nearest)),
        words(start.ids[:, 0]) if start else None,
        level,
        words(centre.ids[:, 0]),
    )
    virtual_tokens = [
        {
            "index": index,
            "nearest": listed(near, index),
            "initial_nearest": listed(start, index) if start else None,
            "score": found["scores"][index],
            "prior_percentile": found["prior_percentile"][index],
            "p_value": found["p_values"][index],
            "initial_percentile": found["initial_percentile"][index] if start else None,
            "signal": found["signal"][index],
            "inherited": found["inherited"][index],
            "kept": texts(changes.kept, index) if changes else None,
            "gained": texts(changes.gained, index) if changes else None,
            "lost": texts(changes.lost, index) if changes else None,
            "moved": bool(changes.moved[index]) if changes else None,
            "script": script(token_text(tokenizer, int(near.ids[index, 0]))),
        }
        for index in range(len(near.ids))
    ]
    return {
        "metric": near.metric,
        "k": near.ids.shape[1],
        "scripts": script_shares(token_text(tokenizer, int(token)) for token in near.ids[:, 0]),
        "languages": languages,
        "virtual_tokens": virtual_tokens,
        "num_signal": int(signal.signal.sum()),
        "prior_band": found["prior_band"],
    }


def _geometry(member: Member, spaces: dict[int, Space], seed: int) -> dict[str, Any]:
    source, layers = member.source, []
    for index, (layer, prior, null) in enumerate(zip(source.layers, member.priors, member.nulls, strict=True)):
        space, prompt = spaces[layer], source.prompt[index]
        vectors = space.vectors.cpu()
        start = prompt if source.initial is None else source.initial[index]
        token = token_geometry(prompt, start, null.draws, prior, vectors, space.excluded).to_dict()
        series = geometry_series(
            source.trajectory[:, index],
            null.draws,
            prior,
            vectors,
            start,
            [step or 0 for step in source.steps],
            null.cosines,
            seed=seed,
            excluded=space.excluded,
            posterior=None if member.drawn is None else member.drawn[:, index],
        ).to_dict() | {"steps": source.steps}
        if source.initial is None:
            token["drift"] = None
            del series["measures"]["drift"]
        layers.append({"layer": layer, "token": token, "series": series})
    return {"layers": layers}


def _posterior(member: Member, space: Space, seed: int) -> dict[str, Any] | None:
    source, config = member.source, member.source.saved.config
    if member.drawn is None:
        return None
    encoder = source.saved.encoder()
    spreads = [posterior_spread(variance) for variance in local_variance(encoder)]
    near = member.near
    return {
        "inference": config.inference,
        "prior_weight": config.prior_weight,
        "num_draws": len(member.drawn),
        "components": len(encoder.posterior.gaussians) if isinstance(encoder.posterior, MixturePosterior) else 1,
        "deviation": torch.stack([spread.deviation for spread in spreads]).mean(),
        "initial_deviation": initial_deviation(config.inference, config.inference_kwargs),
        "determined": torch.stack([spread.determined for spread in spreads]).mean(),
        "kl": kl_divergence(encoder, seed),
        "layers": [{"layer": layer} | spread.to_dict() for layer, spread in zip(source.layers, spreads, strict=True)],
        "agreement": nearest_agreement(near.ids[:, 0], member.drawn[:, 0], space.vectors, near.metric, space.excluded),
    }
