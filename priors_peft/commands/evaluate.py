"""`priors-peft evaluate ADAPTER`: a saved prompt on a task, beside the base model without it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..calibration import Calibration
from ..choices import metrics_by_likelihood
from ..evaluation import answer, best_device
from ..files import write_json
from ..hub.adapter import PRIOR_CONFIG, PRIOR_WEIGHTS, read_adapter, read_task
from ..hub.card import EVALUATION, write_card
from ..hub.facts import read_facts
from ..hub.reading import fetch_file, hash_of, read_json
from ..model import PriorPeftModel
from ..names import check_at_least
from ..tasks import Task
from .arguments import ModelArguments, TaskArguments, parse, parse_object
from .train import base_model_from, room_for_text, task_from


_HEADS = {"nll": "NLL (nats/token)", "ece": "ECE"}


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    batch_size: int = field(default=16, metadata={"help": "Rows a batch"})
    output_file: str | None = field(default=None, metadata={"help": "Where the figures go as JSON too"})
    posterior_draws: int = field(
        default=8, metadata={"help": "Prompts drawn from the posterior, if it is not a point"}
    )
    initial: bool = field(default=False, metadata={"help": "Measure the prompt as it was before training too"})
    max_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a row, without virtual tokens; as in training if unset"}
    )

    def __post_init__(self) -> None:
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("posterior_draws", self.posterior_draws, 1)
        if self.max_length is not None:
            check_at_least("max_length", self.max_length, 1)


def main(arguments: list[str]) -> None:
    """Print likelihood and metrics with and without the prompt; a folder's card shows them from then on."""
    dataclasses = (ModelArguments, TaskArguments, EvaluationArguments)
    adapter, model_arguments, task_arguments, args = parse(dataclasses, arguments, "priors-peft evaluate", ["adapter"])
    saved = read_adapter(adapter)
    config = saved.config
    if model_arguments.model is None:
        model_arguments.model, model_arguments.model_revision = config.base_model_name_or_path, config.revision
    base, tokenizer = base_model_from(model_arguments, best_device())
    _as_trained(adapter, task_arguments)
    length = args.max_length or read_facts(adapter).settings.get("max_length")
    task = task_from(task_arguments, tokenizer, length or room_for_text(base, config.num_virtual_tokens))
    if task.eval is None:
        raise ValueError(f"task must have evaluation rows, got {task.name!r} without any")
    model = PriorPeftModel.from_pretrained(base, adapter)
    figures, calibrations = {}, {}

    def measure(measured: Any, name: str, desc: str) -> None:
        figures[name], calibrations[name] = evaluate(measured, tokenizer, task, args.batch_size, desc, length)

    with model.disable_adapter():
        measure(base, "no prompt", "No prompt")
    if args.initial:
        encoder = model.prompt_encoder["default"]
        encoder.set_prompt(encoder.initial_prompt)
        measure(model, "before training", "Before training")
        saved.restore(encoder, model.active_peft_config)
    measure(model, adapter, "With prompt")
    if model.prompt_encoder["default"].posterior is not None and args.posterior_draws > 1:
        with model.averaged(args.posterior_draws):
            measure(model, f"averaged over {args.posterior_draws} draws", "With draws")
    print(table(figures))
    _keep(adapter, task, figures, calibrations)
    if args.output_file:
        write_json(args.output_file, figures)


def _as_trained(adapter: str, arguments: TaskArguments) -> None:
    """Without a task among the flags, the one the adapter was trained on, with the rows that were held out then."""
    facts = read_task(adapter)
    if facts is None or arguments.task or arguments.train_file or arguments.dataset:
        return
    arguments.task = facts.get("task")
    arguments.task_kwargs = parse_object("task_kwargs", facts.get("task_kwargs")) | parse_object(
        "task_kwargs", arguments.task_kwargs
    )
    arguments.split_seed = arguments.split_seed or facts.get("split_seed", 0)
    if arguments.num_eval is None:
        arguments.num_eval = facts.get("num_eval")


def _keep(
    adapter: str, task: Task, figures: dict[str, dict[str, float]], calibrations: dict[str, Calibration]
) -> None:
    """Leave what was measured beside an adapter that lies here, if it is of the task it was trained on."""
    if not Path(adapter).is_dir() or task.eval is None:
        return
    if (read_task(adapter) or {}).get("task", task.name) != task.name:
        return
    described = fetch_file(adapter, PRIOR_CONFIG, {})
    names = {name: "this prompt" if name == adapter else name for name in figures}
    found = {
        "task": task.name,
        "sha256": None if described is None else hash_of(read_json(described), PRIOR_WEIGHTS),
        "num_rows": len(task.eval),
        "figures": {names[name]: of for name, of in figures.items()},
        "calibration": {names[name]: of.to_dict() for name, of in calibrations.items()},
    }
    write_json(Path(adapter, EVALUATION), found)
    write_card(adapter)


def evaluate(
    model: Any, tokenizer: Any, task: Task, batch_size: int, desc: str, max_length: int | None = None
) -> tuple[dict[str, float], Calibration]:
    """Likelihood (`nll`, nats per answer token), `ece` and a task's metrics, by generation and, with choices, by likelihood.

    With the calibration that `ece` is of.
    """
    answers = answer(model, tokenizer, task.eval, task.max_new_tokens, batch_size, desc, max_length)
    figures = {"nll": answers.nll, "ece": answers.calibration.error}
    figures |= task.metrics(answers.predictions, answers.references)
    by_likelihood = metrics_by_likelihood(task.metrics, model, tokenizer, task.eval, batch_size, max_length)
    return figures | by_likelihood, answers.calibration


def table(figures: dict[str, dict[str, float]]) -> str:
    """Figures as a Markdown table with one row for each key."""
    columns = list(next(iter(figures.values())))
    heads = [_HEADS.get(name) or name.replace("_", " ") for name in columns]
    rows = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in figures.items()]
    return markdown_table(["", *heads], rows)


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """Cells as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows]]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
