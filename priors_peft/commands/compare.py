"""`priors-peft compare RUN... --out DIR`: runs of several priors as a table, with what their prompts and activations say."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.activations import match_lengths
from ..analysis.common import plain
from ..analysis.compare import FOLDS, Run, baseline_of, clusters, grouped, name_runs, table
from ..analysis.geometry import mahalanobis_radius
from ..analysis.measure import no_prompt_nll, task_activations
from ..analysis.members import embeddings_of
from ..analysis.pictures import compare as pictures
from ..analysis.pictures import save_figures
from ..analysis.places import place, regions
from ..analysis.sources import Source, base_model_of, read_sources
from ..config import PriorConfig
from ..data import prompts_of, tokenize
from ..evaluation import best_device
from ..files import atomic_path, check_writable, write_json
from ..fitting import new_encoder
from ..hub.adapter import read_task
from ..hub.facts import public_name, read_facts
from ..hub.reading import read_json
from ..model import PriorPeftModel
from ..names import check_at_least
from ..priors.reference import vocabulary_ids
from ..tasks import load_task
from ..tasks.base import full_name
from ..training_arguments import PriorTrainingArguments
from .arguments import ModelArguments, parse, parse_object
from .evaluate import markdown_table
from .train import base_model_from, room_for_text
from .transfer import model_with


COMPARISON, TEXT = "compare.json", "compare.md"
# Settings that say nothing of an arm.
APART = ("seed", "data_seed", "max_new_tokens", "eval_strategy", "eval_steps")
CONFIG = (
    "tuning",
    "layers",
    "prior",
    "prior_kwargs",
    "deep_init",
    "num_virtual_tokens",
    "coordinates",
    "prior_weight",
    "inference",
    "inference_kwargs",
)
# Of a run.
TOLD = ("name", "task", "tuning", "prior", "seed", "data", "settings", "results", "initial_results")
# Of the vocabulary that lies within the edge of its region, as in the exclusion prior.
INSIDE = 0.99
_ROOM = 16 * 2**20


@dataclass
class ComparisonArguments:
    """Against what runs are held, and on which rows."""

    out: str | None = field(default=None, metadata={"help": "Folder for compare.md, compare.json and pictures"})
    baseline: str | None = field(
        default=None,
        metadata={"help": "The prior that differences are taken from; gaussian, or else the first run's, if unset"},
    )
    tasks: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Settings of tasks as JSON, and further tasks: {"squad": {"data_dir": ...}, "boolq": {}}'},
    )
    num_rows: int = field(default=64, metadata={"help": "Most evaluation rows of a task for the activations"})
    num_permutations: int = field(default=9999, metadata={"help": "Permutations of a p-value"})
    batch_size: int = field(default=16, metadata={"help": "Rows a batch"})
    seed: int = field(default=0, metadata={"help": "Of permutations, folds and projections"})

    def __post_init__(self) -> None:
        given = parse_object("tasks", self.tasks)
        self.tasks = {full_name(name): parse_object(f"tasks[{name!r}]", own) for name, own in given.items()}
        check_at_least("num_rows", self.num_rows, 10)
        check_at_least("num_permutations", self.num_permutations, 1)


def main(arguments: list[str]) -> None:
    """Read runs, measure what needs the model, write figures first and pictures after them, and print the text."""
    names, model_arguments, args = parse(
        (ModelArguments, ComparisonArguments), arguments, "priors-peft compare", ["run..."]
    )
    if not args.out:
        raise ValueError("out must be given: the folder for compare.md, compare.json and pictures")
    sources = read_sources(names)
    runs = [read_run(source) for source in sources]
    name_runs(runs)
    baseline = baseline_of(runs, args.baseline)
    runs.sort(key=lambda run: (run.tuning != "soft", run.tuning, run.prior != baseline, run.prior, run.seed))
    check_writable(args.out, _ROOM, "out", "compared")

    # ---- Model and data -----------------------------------------------------------------
    if model_arguments.model is None:
        model_arguments.model, model_arguments.model_revision = base_model_of(sources)
    base, tokenizer = base_model_from(model_arguments, best_device())
    tokens = load_rows(runs, sources, args, base, tokenizer)

    # ---- Figures ------------------------------------------------------------------------
    for source in sources:
        source.saved.check_fits(base)
    # For each task and tuning the baseline's first run: its prompt stands before the rows of all tasks.
    groups = grouped([run for run in runs if run.prior == baseline], "tuning", "task")
    shown = [min(group, key=lambda run: run.seed) for group in groups.values()]
    model = model_with(base, [next(source for source in sources if source.name == run.name) for run in shown])
    none = {
        task: no_prompt_nll(model, tokens[task], args.batch_size) for task in dict.fromkeys(run.task for run in runs)
    }
    vocabulary = embeddings_of(base)[vocabulary_ids(base.get_input_embeddings(), tokenizer)].cpu()
    config = PriorConfig(num_virtual_tokens=1, token_dim=vocabulary.shape[1], prior="structured")
    (shape,) = new_encoder(base, config, [0], tokenizer)[0].priors

    def radius(points: Tensor) -> Tensor:
        return torch.cat([mahalanobis_radius(part, shape) for part in points.split(4096)])

    edge = float(torch.quantile(radius(vocabulary).double(), INSIDE))
    states = activations(model, tokens, shown, args)
    comparison: dict[str, Any] = {
        "format_version": 1,
        "base_model": public_name(base_model_of(sources)[0]),
        "baseline": baseline,
        "runs": [{name: getattr(run, name) for name in TOLD} for run in runs],
        "no_prompt": none,
        "table": table(runs, baseline),
        "place": {
            tuning: place(group, args.num_permutations, args.seed)
            for (tuning,), group in grouped(runs, "tuning").items()
            if len(group) > len(grouped(group, "task", "seed"))
        },
        "regions": regions(runs, radius, edge, none),
        "clusters": clusters(states, args.seed),
    }
    out = Path(args.out)
    write_json(out / COMPARISON, plain(comparison))
    text = markdown(comparison)
    with atomic_path(out / TEXT) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    print(text)

    # ---- Pictures -----------------------------------------------------------------------
    drawn = {
        "learning_curves": lambda: pictures.curves(runs, comparison["table"], none),
        "prompts": lambda: pictures.prompts(runs, vocabulary, comparison["place"], args.seed),
        "activations_pca": lambda: pictures.tasks(states, comparison["clusters"], "pca", args.seed),
        "activations_tsne": lambda: pictures.tasks(states, comparison["clusters"], "tsne", args.seed),
    }
    written = save_figures(drawn, out)
    print(f"\n{', '.join(path.name for path in (out / TEXT, out / COMPARISON, *written))} are in {out}")


# Reading.


def read_run(source: Source) -> Run:
    """What a run's folder says.

    Raises:
        ValueError: It holds no results of an evaluation, no task, or no start and prior.
    """
    facts, config, folder = read_facts(source.path), source.saved.config, Path(source.path)
    results, task = facts.results.get("default", {}), read_task(source.path) or {}
    missing = (
        "a task in task.json" if not task.get("task") else "" if "loss" in results else "training.json with results"
    )
    if source.initial is None or missing:
        raise ValueError(
            f"run must have been trained and evaluated by `priors-peft train` with evaluation rows, got "
            f"{source.name!r} without {missing or 'prior and start'}: train it with that command and num_eval > 0"
        )
    state = folder / "trainer_state.json"
    history = read_json(state)["log_history"] if state.is_file() else []
    described = config.to_dict()
    # A text prior without a text of its own is about the task, whichever that is.
    if described["prior_kwargs"].get("text", "") == task.get("description"):
        described["prior_kwargs"] = {key: value for key, value in described["prior_kwargs"].items() if key != "text"}
    settings = {name: described[name] for name in CONFIG if described.get(name) not in (None, {})}
    settings |= _fitted_on(source, facts.recipe)
    if facts.posterior_draws not in (None, PriorTrainingArguments.posterior_draws):
        settings["posterior_draws"] = facts.posterior_draws
    settings |= {name: value for name, value in facts.settings.items() if name not in APART and value is not None}
    data = {name: task.get(name) for name in ("task", "task_kwargs", "split_seed", "num_eval")}
    return Run(
        name=source.name,
        data=data | {"max_length": settings.pop("max_length", None)},
        seed=config.seed,
        settings=settings,
        results=_with_nll(results),
        initial_results=_with_nll(facts.initial_results.get("default", {})),
        curve=[(entry["step"], entry["prior/nll"]) for entry in history if "prior/nll" in entry],
        prompt=source.prompt,
        start=source.initial,
        priors=source.saved.priors,
    )


def _fitted_on(source: Source, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that say what the prior was fitted on, if it is more than the vocabulary: the rows of its own task,
    whichever that is, or a short hash of the texts and their number of tokens, of the prompts or of the vectors."""
    given = recipe.get("reference_kwargs") or {}
    if recipe.get("reference") == "activations" and "tasks" not in given:
        return {"fitted_on": {"fitted_on": "own task"} | given}
    origins = [one for one in source.saved.provenance if one.source != "vocabulary" or one.data]
    names = dict.fromkeys(f"{one.data or one.sha256} {one.rows}" for one in origins)
    return {"fitted_on": hashlib.sha256("".join(names).encode()).hexdigest()[:8]} if names else {}


def _with_nll(figures: Mapping[str, float]) -> dict[str, float]:
    return {"nll" if name == "loss" else name: value for name, value in figures.items()}


def load_rows(
    runs: Sequence[Run], sources: Sequence[Source], args: ComparisonArguments, base: Any, tokenizer: Any
) -> dict[str, Any]:
    """Tokens by the name of the runs' tasks, cut as those that the runs were evaluated on, and of further tasks."""
    given: dict[str, Any] = dict(args.tasks or {})  # type: ignore[arg-type]
    room = room_for_text(base, max(source.prompt.shape[1] for source in sources))
    rows: dict[str, Any] = {}
    for run in runs:
        if run.task in rows:
            continue
        data = run.data
        settings = (data["task_kwargs"] or {}) | given.get(data["task"], {})
        length = data["max_length"] or room
        if data["task"] == "completions" and not {"train_file", "dataset"} & settings.keys():
            raise ValueError(
                f"tasks must say where the rows of {run.task!r} lie, which runs don't keep, got {args.tasks}: pass "
                '--tasks \'{"completions": {"train_file": ...}}\''
            )
        task = load_task(
            data["task"],
            **{"num_eval": data["num_eval"], "seed": data["split_seed"], "tokenizer": tokenizer}
            | {"max_length": length}
            | settings,
        )
        if task.eval is None or len(task.eval) != data["num_eval"]:
            raise ValueError(
                f"task must have the {data['num_eval']} evaluation rows of the runs, got "
                f"{0 if task.eval is None else len(task.eval)} of {run.task!r}: pass its data, --tasks "
                f'\'{{"{data["task"]}": {{"data_dir": ...}}}}\''
            )
        rows[run.task] = tokenize(task.eval, tokenizer, length)
    length = min((run.data["max_length"] or room or 0 for run in runs), default=0) or None
    for name, settings in given.items():
        if name not in {run.data["task"] for run in runs}:
            more = {"num_eval": args.num_rows, "tokenizer": tokenizer, "max_length": length} | settings
            rows[name] = tokenize(load_task(name, **more).eval, tokenizer, length)
    return rows


# Activations.


def activations(
    model: PriorPeftModel, tokens: Mapping[str, Any], shown: Sequence[Run], args: ComparisonArguments
) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Mean states of the rows before their answers, cut to equal lengths, `[n, d]` by condition, layer and task.

    Padding, virtual tokens and each row's first token, an attention sink, don't count. Conditions are no prompt, and one prompt before the rows of all tasks. Empty
    for one task, or fewer rows than the probe's folds.
    """
    columns = ("input_ids", "attention_mask", "labels")
    before = {
        name: prompts_of(*(list(rows[column])[: args.num_rows] for column in columns)) for name, rows in tokens.items()
    }
    count = min(map(len, before.values()))
    # Plain text has one token before it, which doesn't count.
    if len(before) < 2 or min(sum(len(row) > 1 for row in rows[:count]) for rows in before.values()) < FOLDS:
        return {}
    matched = match_lengths(before, minimum=2)
    cut = [row for rows in matched.values() for row in rows]
    sizes = [len(rows) for rows in matched.values()]
    depth = model.base_model.config.get_text_config().num_hidden_layers
    layers = sorted({depth // 3, 2 * depth // 3, depth})

    def of(with_prompt: bool) -> dict[int, dict[str, Tensor]]:
        found = task_activations(model, cut, layers, with_prompt, batch_size=args.batch_size, skip=1)
        return {layer: dict(zip(matched, points.split(sizes), strict=True)) for layer, points in found.items()}

    states = {"no prompt": of(False)}
    for adapter, run in zip(list(model.peft_config), shown, strict=True):
        model.set_adapter(adapter, inference_mode=True)
        states[f"{run.tuning}, {run.prior}, {run.task}"] = of(True)
    return states


# The text.


def markdown(comparison: dict[str, Any]) -> str:
    """The table, and what was found on each claim of the embedding-priors paper, with its figures."""
    parts = [f"# Runs compared on {comparison['base_model'] or 'one base model'}"]
    for task, none in comparison["no_prompt"].items():
        rows = [row for row in comparison["table"] if row["task"] == task]
        parts.append(f"## {task}\n\n{_table(rows, none, comparison['baseline'])}")
    parts += [_place(comparison["place"]), _regions(comparison["regions"]), _clusters(comparison["clusters"])]
    return "\n\n".join(filter(None, parts))


def _table(rows: list[dict[str, Any]], none: float, baseline: str) -> str:
    metrics = [name for name in rows[0]["results"] if all(name in row["results"] for row in rows)]
    before = [name for name in metrics if name == "nll" and all(name in row["initial_results"] for row in rows)]
    heads = ["tuning", "prior", "seeds", *(f"{name} before" for name in before), *metrics, f"nll − {baseline}"]
    lines = []
    for row in rows:
        found = row["difference"]
        figures = [row["initial_results"][name] for name in before] + [row["results"][name] for name in metrics]
        said = "" if found is None else with_error(found)
        cells = [f"{one['mean']:.3f}" + ("" if one["std"] is None else f" ± {one['std']:.3f}") for one in figures]
        lines.append([row["tuning"], row["prior"], str(len(row["seeds"])), *cells, said])
    return (
        f"No prompt: nll {none:.3f}. Mean ± standard deviation over seeds, nll in nats per answer token; differences of "
        f"runs of one seed, mean ± standard error over seeds (n pairs).\n\n{markdown_table(heads, lines)}"
    )


def with_error(found: dict[str, Any]) -> str:
    """A mean with its standard error and the number of pairs."""
    if not found["n"]:
        return "no pairs"
    return (
        f"{found['mean']:+.3f}".replace("-", "−")
        + ("" if found["se"] is None else f" ± {found['se']:.3f}")
        + f" ({found['n']})"
    )


def _place(place: dict[str, dict[str, Any]]) -> str:
    if not place:
        return ""
    heads = ["tuning", "runs", "moved", "to other starts", "nearest own start", "own prior likeliest", "at the start"]
    heads += ["other seed", "other task", "other prior", "MMD² between", "within", "p"]
    lines = []
    for tuning, one in place.items():
        shares = [f"{one[name]:.0%}" for name in ("nearest_start", "likeliest", "likeliest_at_start")]
        far = ["" if value is None else f"{value:.3f}" for value in one["distances"].values()]
        mmd = one["mmd"]
        test = (
            ["", "", ""]
            if mmd is None
            else [*(f"{mmd[name]:.3f}".replace("-", "−") for name in ("between", "within")), f"{mmd['p_value']:.4f}"]
        )
        lines.append(
            [tuning, str(one["runs"]), f"{one['moved']:.3f}", f"{one['to_other_starts']:.3f}", *shares, *far, *test]
        )
    chances = {tuning: f"{one['chance']:.0%}" for tuning, one in place.items()}
    alike = len(set(chances.values())) == 1
    chance = next(iter(chances.values())) if alike else ", ".join(f"{value} ({of})" for of, value in chances.items())
    return (
        '## "Priors strongly affect the position of the tuned embeddings"\n\nDistances are root mean squares over '
        "coordinates: moved from the own start, to the starts of other priors, and between trained prompts that differ in "
        f"one thing alone. Chance of the own prior being the likeliest: {chance}. MMD² between virtual tokens of runs of "
        f"different priors and of one prior, and the permutation test's p.\n\n{markdown_table(heads, lines)}"
    )


def _regions(regions: dict[str, Any]) -> str:
    heads = ["tuning", "prior", "outside at the start", "outside after", "gain over no prompt (nats)"]
    lines = [
        [
            arm["tuning"],
            arm["prior"],
            f"{arm['outside_at_start']:.0%}",
            f"{arm['outside']:.0%}",
            with_error(arm["gain"]),
        ]
        for arm in regions["arms"]
    ]
    said = [
        f"{tuning}: {one['far_started']['better_than_none']} of {one['far_started']['runs']} runs that started outside and "
        f"{one['far_ended']['better_than_none']} of {one['far_ended']['runs']} that ended outside beat no prompt"
        + ("" if one["difference"] is None else f"; nll {with_error(one['difference'])}")
        for tuning, one in regions["tunings"].items()
    ]
    return (
        '## "Models can work with embeddings from new regions"\n\nShare of virtual tokens at the embedding layer that lie '
        f"further out (Mahalanobis) than {INSIDE:.0%} of the vocabulary. Gains are means over tasks, and of these over "
        f"seeds ± standard error (n seeds).\n\n{markdown_table(heads, lines)}\n\n"
        "Far is more than half of a prompt's virtual tokens; nll of runs that started there less that of the runs of the same "
        "task and seed that did not, likewise:\n\n" + "\n".join(f"- {line}" for line in said)
    )


def _clusters(found: list[dict[str, Any]]) -> str:
    if not found:
        return (
            f"Activations are not compared: that takes two tasks with at least {FOLDS} evaluation rows each (--tasks)."
        )
    heads = ["before the rows", "layer", "tasks", "rows each", "silhouette", "probe accuracy", "chance"]
    lines = [
        [one["condition"], str(one["layer"]), " / ".join(one["tasks"]), str(min(one["counts"].values()))]
        + [f"{one['silhouette']:.2f}", f"{one['probe_accuracy']:.0%} ± {one['probe_std']:.0%}", f"{one['chance']:.0%}"]
        for one in found
    ]
    return (
        '## "Distinct clusters of activations for distant tasks"\n\nMean states of held-out rows before their answers, cut '
        f"to equal lengths, without padding, virtual tokens and first tokens (attention sinks); a linear probe in {FOLDS} folds.\n\n"
        + markdown_table(heads, lines)
    )
