"""`priors-peft evaluate ADAPTER`: a saved prompt on a task, beside the base model without it."""

from dataclasses import dataclass, field

from ..evaluation import answer
from ..files import write_json
from ..hub.adapter import read_adapter
from ..model import PriorPeftModel
from .arguments import ModelArguments, TaskArguments, parse
from .train import base_model_from, task_from


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    seed: int = field(default=0, metadata={"help": "Seed of the task's split: the one of training"})
    batch_size: int = field(default=16, metadata={"help": "Rows a batch"})
    output_file: str | None = field(default=None, metadata={"help": "Where the figures go as JSON too"})


def main(arguments: list[str]) -> None:
    """Print likelihood and metrics with and without the prompt."""
    dataclasses = (ModelArguments, TaskArguments, EvaluationArguments)
    adapter, model_arguments, task_arguments, args = parse(dataclasses, arguments, "priors-peft evaluate", ["adapter"])
    model_arguments.model = model_arguments.model or read_adapter(adapter).config.base_model_name_or_path
    task = task_from(task_arguments, args.seed)
    if task.eval is None:
        raise ValueError(f"task must have evaluation rows, got {task.name!r} without any")
    base, tokenizer = base_model_from(model_arguments)
    model = PriorPeftModel.from_pretrained(base, adapter)
    figures = {}
    with model.disable_adapter():
        answers = answer(base, tokenizer, task.eval, task.max_new_tokens, args.batch_size, "No prompt")
    figures["no prompt"] = {"nll": answers.nll} | task.metrics(answers.predictions, answers.references)
    answers = answer(model, tokenizer, task.eval, task.max_new_tokens, args.batch_size, "With prompt")
    figures[adapter] = {"nll": answers.nll} | task.metrics(answers.predictions, answers.references)
    print(table(figures))
    if args.output_file:
        write_json(args.output_file, figures)


def table(figures: dict[str, dict[str, float]]) -> str:
    """A Markdown table with one row for each key."""
    columns = list(next(iter(figures.values())))
    heads = ["", *("NLL (nats/token)" if name == "nll" else name.replace("_", " ") for name in columns)]
    rows = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in figures.items()]
    widths = [max(len(row[index]) for row in [heads, *rows]) for index in range(len(heads))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [heads, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
