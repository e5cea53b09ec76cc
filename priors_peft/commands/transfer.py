"""`priors-peft transfer ADAPTER... --tasks TASK...`: every prompt on every task, and whether similarity foretells it."""

import importlib.metadata
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..analysis.collect import FORMAT_VERSION, PACKAGES, public_name
from ..analysis.matrix import NO_PROMPT, KeptFigures, measure_matrix, model_similarities, transfer_part
from ..analysis.sources import Source, base_model_of, read_sources
from ..evaluation import best_device
from ..files import write_json
from ..hub.adapter import read_task
from ..model import PriorPeftModel
from ..names import check_at_least
from ..priors import prior_family
from ..tasks import Task, load_task
from ..tasks.base import full_name
from .analyze import ANALYSIS, REPORT, read_analysis
from .arguments import ModelArguments, parse, parse_object
from .evaluate import markdown_table
from .train import base_model_from, room_for_text


logger = logging.getLogger(__name__)

CELLS = "transfer_cells.json"
ELSEWHERE = "other"


@dataclass
class TransferArguments:
    """Which tasks, and what is made of the matrix."""

    tasks: list[str] | None = field(default=None, metadata={"help": "Tasks by name: rte wsc math superglue:cb"})
    own: list[str] | None = field(
        default=None,
        metadata={"help": "The task each adapter was trained on, in their order, or other; what train noted if unset"},
    )
    out: str | None = field(default=None, metadata={"help": "Folder for analysis.json and the pictures"})
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the data sets' own published files"})
    task_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Settings of tasks by name as JSON: {"math": {"module": "algebra__linear_1d"}}'},
    )
    num_eval: int | None = field(default=None, metadata={"help": "Most evaluation rows of a task"})
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the rows; as in training, where rows were held out of the training rows"}
    )
    metric: str | None = field(default=None, metadata={"help": "Figure in the matrix; the tasks' own metric if unset"})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row, without virtual tokens"})
    batch_size: int = field(default=16, metadata={"help": "Rows a batch"})
    seed: int = field(default=0, metadata={"help": "Seed of permutations and bootstrap"})
    num_permutations: int = field(default=10_000, metadata={"help": "Permutations of a p-value"})

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        self.task_kwargs = {
            full_name(name): parse_object(f"task_kwargs[{name!r}]", settings)
            for name, settings in parse_object("task_kwargs", self.task_kwargs).items()
        }


def main(arguments: list[str]) -> None:
    """Measure what is not measured yet, add the part to `analysis.json`, and print it."""
    dataclasses = (ModelArguments, TransferArguments)
    adapters, model_arguments, args = parse(dataclasses, arguments, "priors-peft transfer", ["adapter..."])
    part = transfer(adapters, model_arguments, args)
    draw(Path(args.out))
    print(matrix_table(part))
    for line in findings(part):
        print(line)


def transfer(adapters: Sequence[str], model_arguments: ModelArguments, args: TransferArguments) -> dict[str, Any]:
    """Measure the matrix and write it into `args.out`; returns the `"transfer"` part of its `analysis.json`."""
    # ---- What is asked for --------------------------------------------------------------
    if not args.tasks:
        raise ValueError("tasks must name at least one task, got none: --tasks rte wsc")
    if not args.out:
        raise ValueError("out must be a folder to write to, got none: --out analysis")
    names = [full_name(task) for task in args.tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks must be different, got {args.tasks}")
    unused = sorted(set(args.task_kwargs or {}) - set(names))
    if unused:
        raise ValueError(f"task_kwargs must be of tasks among {', '.join(names)}, got {', '.join(unused)}")
    sources = read_sources(adapters)
    own = own_tasks(adapters, sources, args.own)
    analysis_path = Path(args.out, ANALYSIS)
    kept = KeptFigures(Path(args.out, CELLS))
    if model_arguments.model is None:
        model_arguments.model, model_arguments.model_revision = base_model_of(sources)
    read_analysis(analysis_path, model_arguments.model)

    # ---- Model and data -----------------------------------------------------------------
    base, tokenizer = base_model_from(model_arguments, best_device())
    for source in sources:
        source.saved.check_fits(base)
    room = args.max_length or room_for_text(base, max(source.prompt.shape[1] for source in sources))
    tasks = {name: load(name, args, tokenizer, room) for name in names}
    model = model_with(base, sources)

    # ---- Measuring ----------------------------------------------------------------------
    figures = measure_matrix(model, tokenizer, tasks, kept, args.batch_size, args.max_length)
    shown = {NO_PROMPT: figures[NO_PROMPT]}
    shown |= {source.name: figures[adapter] for source, adapter in zip(sources, model.peft_config, strict=True)}
    similarities, notes = model_similarities(model)
    part = transfer_part(shown, names, own, similarities, notes, args.metric, args.num_permutations, args.seed)
    part["num_rows"] = {name: len(task.eval) for name, task in tasks.items()}  # type: ignore[arg-type]

    # ---- Writing ------------------------------------------------------------------------
    analysis = read_analysis(analysis_path, model_arguments.model) or new_analysis(
        model_arguments.model, sources, own, args.seed
    )
    analysis |= {"transfer": part}
    analysis.get("left_out", {}).pop("transfer", None)
    write_json(analysis_path, analysis)
    return part


def own_tasks(adapters: Sequence[str], sources: Sequence[Source], given: Sequence[str] | None) -> list[str | None]:
    """Full name of the task each source was trained on; None where nobody says."""
    if given is None:
        noted = [read_task(source.path) or {} for source in sources]
        return [task.get("task") for task in noted]
    if len(given) != len(adapters):
        raise ValueError(f"own must name a task for each of the {len(adapters)} adapters, got {len(given)}")
    by_path = {
        str(adapter): ELSEWHERE if task == ELSEWHERE else full_name(task)
        for adapter, task in zip(adapters, given, strict=True)
    }
    return [by_path[source.path] for source in sources]


def load(name: str, args: TransferArguments, tokenizer: Any, max_length: int | None) -> Task:
    """A task with its evaluation rows."""
    settings: dict[str, Any] = {"data_dir": args.data_dir, "num_eval": args.num_eval, "max_length": max_length}
    settings |= args.task_kwargs.get(name, {})  # type: ignore[union-attr]
    task = load_task(name, seed=args.split_seed, tokenizer=tokenizer, **settings)
    if not task.eval:
        raise ValueError(f"task must have evaluation rows, got {name!r} without any")
    return task


def model_with(base: Any, sources: Sequence[Source]) -> PriorPeftModel:
    """A model with all sources as adapters, in their order."""
    model = PriorPeftModel.from_pretrained(base, sources[0].path, "prompt_0")
    for number, source in enumerate(sources[1:], start=1):
        # Not by their own names: a module's can't have a dot.
        model.load_adapter(source.path, f"prompt_{number}")
    return model.eval()


def new_analysis(
    base_model: str | None, sources: Sequence[Source], own: Sequence[str | None], seed: int
) -> dict[str, Any]:
    """An `analysis.json` without any part, for a folder where `analyze` has not run."""
    adapters = [
        {
            "name": source.name,
            "source": public_name(source.path),
            "tuning": source.saved.config.tuning,
            "prior": prior_family(source.saved.priors[0]),
            "num_virtual_tokens": source.prompt.shape[1],
            "layers": source.layers,
            "task": task,
            "steps": source.steps[-1],
            "tokens": None,
            "geometry": None,
            "faithfulness": None,
        }
        for source, task in zip(sources, own, strict=True)
    ]
    parts = ("projection", "activations", "words", "stability", "transfer", "questions")
    return dict.fromkeys(parts) | {
        "format_version": FORMAT_VERSION,
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": None,
        "base_model": public_name(base_model),
        "adapters": adapters,
        "seed": seed,
        "left_out": dict.fromkeys(parts[:-2], "`priors-peft analyze` computes it"),
    }


def draw(folder: Path) -> None:
    """The pictures of a folder's `analysis.json`, and its report if there is one already."""
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning('Pictures need matplotlib: pip install "priors_peft[analysis]"')
        return
    from ..analysis.pictures import save_pictures

    analysis = json.loads((folder / ANALYSIS).read_text(encoding="utf-8"))
    save_pictures(analysis, folder)
    report = folder / REPORT
    if report.exists():
        from ..analysis.report import save_report

        save_report(analysis, report)


def matrix_table(part: dict[str, Any]) -> str:
    """The matrix as a Markdown table, no prompt first; a prompt's own task is marked."""
    heads = [f"{part['metric'].replace('_', ' ')}", *part["tasks"]]
    rows = [[NO_PROMPT, *(f"{score:.3f}" for score in part["no_prompt"])]]
    for name, own, scores in zip(part["prompts"], part["own_tasks"], part["scores"], strict=True):
        cells = [f"{score:.3f}" + " (own)" * (task == own) for task, score in zip(part["tasks"], scores, strict=True)]
        rows.append([name, *cells])
    return markdown_table(heads, rows)


def findings(part: dict[str, Any]) -> list[str]:
    """What the matrix says, a line each."""
    lines = []
    for metric, found in part["by_metric"].items():
        if found["share_beating_no_prompt"] is None:
            continue
        counts = f"{found['wins']} of {found['transfers']}"
        lines.append(f"{metric}: {found['share_beating_no_prompt']:.0%} of transfers beat no prompt ({counts}).")
        for name, one in (found["correlations"] or {}).items():
            if one["rho"] is None:
                lines.append(f"{metric}: similarity ({name}) or transfer does not vary.")
            else:
                low, high = ("?" if bound is None else f"{bound:.2f}" for bound in one["interval"])
                lines.append(
                    f"{metric}: similarity ({name}) and transfer correlate with rho = {one['rho']:.2f} (95 % {low} to "
                    f"{high}), permutation p = {one['p_value']:.3f}; it can't go below {one['smallest_p']:.3f}."
                )
    return [*lines, *part["notes"]]
