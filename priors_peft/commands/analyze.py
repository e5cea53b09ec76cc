"""`priors-peft analyze ADAPTER... --out DIR`: what prompts mean, as JSON, pictures and a page."""

import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..analysis import claims
from ..analysis.collect import FORMAT_VERSION, analyze, public_name
from ..analysis.common import MADE_WITH, check_installed
from ..analysis.on_tasks import spread
from ..analysis.sources import base_model_of, read_sources
from ..analysis.tokens import METRICS
from ..evaluation import best_device
from ..files import check_writable, write_json
from ..names import check_at_least, check_choice
from ..tasks import load_task
from ..tasks.base import full_name
from .arguments import ModelArguments, TaskArguments, parse, parse_object
from .evaluate import markdown_table
from .train import PLACES, base_model_from, room_for_text, task_from


ANALYSIS, REPORT = "analysis.json", "report.html"
# A bound on what is found out about the folder before anything is computed.
_ROOM = 16 * 2**20


@dataclass
class AnalysisArguments:
    """What to analyse, how thoroughly."""

    out: str | None = field(default=None, metadata={"help": "Folder for analysis.json, pictures and report.html"})
    k: int = field(default=10, metadata={"help": "Nearest tokens of each virtual token"})
    metric: str = field(default="cosine", metadata={"help": "What near means: cosine, l2 or dot"})
    num_draws: int = field(default=200, metadata={"help": "Random prompts from each prior, as a null"})
    seed: int = field(default=0, metadata={"help": "Of random prompts, samples and projections"})
    num_rows: int = field(default=128, metadata={"help": "Most evaluation rows of a task that losses are measured on"})
    contrast: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'More tasks, compared by their activations, as JSON: {"squad": {"data_dir": ...}}'},
    )
    activation_layers: str | None = field(
        default=None, metadata={"help": "Where they are compared: numbers like 10,-1; a third, two thirds, the end"}
    )
    describe: bool = field(default=False, metadata={"help": "Have the model describe each prompt in its own words"})
    umap: bool = field(default=False, metadata={"help": "Project by UMAP too; needs umap-learn"})
    batch_size: int = field(default=16, metadata={"help": "Rows a batch"})

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        check_at_least("num_rows", self.num_rows, 1)
        check_at_least("batch_size", self.batch_size, 1)
        self.contrast = parse_object("contrast", self.contrast)
        for name, settings in self.contrast.items():
            full_name(name)
            if not isinstance(settings, dict):
                raise ValueError(f"contrast must give each task's settings as an object, got {settings!r} for {name}")
        if isinstance(self.activation_layers, str):
            try:
                layers = [int(layer) for layer in self.activation_layers.split(",")]
            except ValueError:
                raise ValueError(
                    f"activation_layers must be numbers like 10,-1, got {self.activation_layers!r}"
                ) from None
            self.activation_layers = layers  # type: ignore[assignment]


def main(arguments: list[str]) -> None:
    """Analyse adapters of one base model; the figures are written first, so that no picture can lose them."""
    dataclasses = (ModelArguments, TaskArguments, AnalysisArguments)
    adapters, model_arguments, task_arguments, args = parse(
        dataclasses, arguments, "priors-peft analyze", ["adapter..."]
    )
    if not args.out:
        raise ValueError("out must be given: the folder for analysis.json, pictures and report.html")
    check_installed("priors-peft analyze", MADE_WITH)
    sources = read_sources(adapters)
    command = _command([source.name for source in sources], model_arguments, task_arguments, args)
    check_writable(args.out, _ROOM, "out", "analysed")
    if model_arguments.model is None:
        model_arguments.model, model_arguments.model_revision = base_model_of(sources)
    base, tokenizer = base_model_from(model_arguments, best_device())
    longest = max(source.prompt.shape[1] for source in sources)
    tasks = _tasks(task_arguments, args, tokenizer, room_for_text(base, longest))
    analysis = analyze(
        adapters,
        base,
        tokenizer,
        tasks,
        k=args.k,
        metric=args.metric,
        num_draws=args.num_draws,
        seed=args.seed,
        describe=args.describe,
        umap=args.umap,
        activation_layers=args.activation_layers,
        batch_size=args.batch_size,
        command=command,
    )
    folder = Path(args.out)
    keep_transfer(folder / ANALYSIS, analysis)
    write_json(folder / ANALYSIS, analysis)
    print(summary(analysis))
    print(f"\nfigures: {folder / ANALYSIS}")

    from ..analysis.pictures import save_pictures
    from ..analysis.report import save_report

    written = save_pictures(analysis, folder)
    print(f"pictures: {', '.join(path.name for path in written)}")
    save_report(analysis, folder / REPORT)
    print(f"report: {folder / REPORT}")


def _tasks(
    arguments: TaskArguments, args: AnalysisArguments, tokenizer: Any, max_length: int | None
) -> dict[str, list[dict[str, Any]]]:
    """Evaluation rows of the task that the flags name, if any, and of those it is contrasted with."""
    loaded = []
    if arguments.task or arguments.train_file or arguments.dataset:
        loaded.append(task_from(arguments, tokenizer, max_length))
    elif args.contrast:
        raise ValueError("task must be given for contrast: activations of two tasks are compared")
    for name, settings in args.contrast.items():  # type: ignore[union-attr]
        loaded.append(load_task(name, **{"tokenizer": tokenizer, "max_length": max_length} | settings))
    tasks: dict[str, list[dict[str, Any]]] = {}
    for task in loaded:
        if task.eval is None or not len(task.eval):
            raise ValueError(
                f"task must have evaluation rows, got {task.name!r} without any: hold some out (num_eval)"
            )
        if task.name in tasks:
            raise ValueError(f"contrast must name other tasks than task, got {task.name!r} twice")
        tasks[task.name] = [dict(row) for row in task.eval.select(spread(len(task.eval), args.num_rows))]
    return tasks


def _command(names: list[str], *given: Any) -> str:
    """The command again, without the folders of this machine and in an order of its own."""
    words = ["priors-peft", "analyze", *names]
    for arguments in given:
        for item in fields(arguments):
            value, place = getattr(arguments, item.name), item.name in (*PLACES, "model")
            if item.name in ("model_revision", "out") or not value or value == item.default:
                continue
            if item.name in ("contrast", "task_kwargs"):
                value = json.dumps(_without_places(value), sort_keys=True)
            elif item.name == "activation_layers":
                value = ",".join(map(str, value))
            elif place:
                value = Path(value).name if Path(value).exists() else value
            words += [f"--{item.name}", str(value)]
    return shlex.join([*words, "--out", "DIR"])


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in PLACES
    }


def keep_transfer(path: Path, analysis: dict[str, Any]) -> None:
    """Take over what `priors-peft transfer` measured into this folder; nothing of another base model's analysis."""
    try:
        before = read_analysis(path, analysis["base_model"])
    except ValueError:
        return
    if before and before.get("transfer"):
        analysis["transfer"] = before["transfer"]
        del analysis["left_out"]["transfer"]


def read_analysis(path: Path, base_model: str | None) -> dict[str, Any] | None:
    """What `analyze` or an earlier run left in the folder.

    Raises:
        ValueError: It is no analysis of this version, or of another base model.
    """
    if not path.exists():
        return None
    try:
        analysis = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, got: {error}. Move it or pass another out") from error
    version = analysis.get("format_version") if isinstance(analysis, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version must be {FORMAT_VERSION} in {path}, got {version!r}: pass another out")
    if analysis.get("base_model") != public_name(base_model):
        raise ValueError(
            f"out must not hold the analysis of another base model, got {path} of {analysis.get('base_model')!r} for "
            f"adapters of {public_name(base_model)!r}: pass another out"
        )
    return analysis


def summary(analysis: dict[str, Any]) -> str:
    """What an analysis says, a few lines for each adapter and a table of its virtual tokens."""
    lines = []
    several = len(analysis["adapters"]) > 1
    for adapter in analysis["adapters"]:
        shape = f"{adapter['num_virtual_tokens']} virtual tokens"
        lines += [
            "",
            f"{adapter['name']}: {adapter['tuning']}, {shape}, prior {adapter['prior']} on {analysis['base_model']}",
        ]
        said = [claims.signal(adapter, analysis["level"]), claims.stayed(adapter), claims.language_found(adapter)]
        said += [claims.collapse(adapter), claims.drift(adapter), claims.posterior(adapter)]
        said.append(claims.faithfulness(adapter))
        if adapter["description"] is not None:
            said.append(
                f"in the model's words: {adapter['description']!r} (a random prompt: {adapter['description_of_draw']!r})"
            )
        if len(adapter["layers"]) > 1:
            said.append(adapter["parts"])
        lines += [f"  {line}" for line in said if line]
        if not several:
            lines += ["", _token_table(adapter["tokens"], analysis["level"])]
    for group in (analysis["stability"] or {}).get("groups", []):
        lines += ["", f"runs of {group['task'] or 'one task'}: {claims.stability(group)}"]
    left_out = [f"  {part}: {reason}" for part, reason in sorted(analysis["left_out"].items())]
    return "\n".join([*lines[1:], "", "left out:", *left_out])


def _token_table(tokens: dict[str, Any], level: float) -> str:
    rows = []
    for token in tokens["virtual_tokens"]:
        nearest = " ".join(near["text"] for near in token["nearest"][:3])
        mark = {"signal": "signal", "inherited": "inherited"}.get(claims.token_state(token, level), "")
        figures = (f"{token['score']:.3f}", f"{token['prior_percentile']:.0f}", f"{token['p_value']:.3f}")
        rows.append([str(token["index"]), nearest.replace("|", "\\|"), *figures, mark])
    return markdown_table(["", "nearest tokens", tokens["metric"], "percentile of prior", "p", ""], rows)
