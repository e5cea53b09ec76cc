"""The study of what soft prompts mean: runs of several tasks from their English descriptions, analysed into one report.

`python recipes/semantics/run.py [RECIPE.yaml] [--FLAG VALUE ...]`; the flags are those of `priors-peft train` and the
few below. What is done is not done again: a run that was stopped goes on when it is started again.
"""

import copy
import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from questions import moves_of, questions

from priors_peft.analysis.collect import analyze
from priors_peft.analysis.common import MADE_WITH, check_installed
from priors_peft.analysis.pictures import save_pictures
from priors_peft.analysis.report import save_report
from priors_peft.analysis.sources import read_sources
from priors_peft.commands.analyze import ANALYSIS, REPORT
from priors_peft.commands.arguments import ModelArguments, PromptArguments, TaskArguments, parse
from priors_peft.commands.train import TrainingArguments, base_model_from, train
from priors_peft.commands.transfer import TransferArguments, findings, matrix_table, transfer
from priors_peft.evaluation import best_device
from priors_peft.files import sha256, write_json
from priors_peft.hub.adapter import ADAPTER_WEIGHTS, PRIOR_CONFIG
from priors_peft.names import check_choice
from priors_peft.tasks import load_task
from priors_peft.tasks.base import full_name
from priors_peft.tasks.superglue import SUBTASKS


RECIPE = Path(__file__).with_name("soft_text.yaml")
SETTINGS, ANALYSED = "settings.json", "analysed.json"
# What must be the same for runs to be seeds of one experiment.
OF_TRAINING = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_length",
    "prior_weight_schedule",
)


@dataclass
class StudyArguments:
    """What the study is of, and how thoroughly it is analysed."""

    tasks: list[str] = field(
        default_factory=lambda: ["rte", "wsc", "boolq", "wic"], metadata={"help": "SuperGLUE's tasks by name"}
    )
    seeds: int = field(
        default=4, metadata={"help": "Runs of each task: seeds 0, 1, ... of the start and the data order"}
    )
    num_transfer: int = field(
        default=32, metadata={"help": "Evaluation rows of a task for the transfer matrix and activations"}
    )
    num_analysis: int = field(default=4, metadata={"help": "How many of them for faithfulness and lines between runs"})
    num_draws: int = field(default=200, metadata={"help": "Random prompts from each prior, as a null"})
    eval_batch_size: int = field(default=16, metadata={"help": "Rows a batch when prompts are measured"})

    def __post_init__(self) -> None:
        # Other tasks hold rows out of their training rows, other ones for each number of them.
        for task in self.tasks:
            check_choice("tasks", task.removeprefix("superglue:").lower(), SUBTASKS)
        self.tasks = [full_name(task) for task in self.tasks]
        for name in ("seeds", "num_transfer", "num_analysis"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def main(arguments: list[str]) -> None:
    # ---- What is asked for --------------------------------------------------------------
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(RECIPE), *arguments]
    dataclasses = (StudyArguments, ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    study, model, task, prompt, training = parse(dataclasses, arguments, "python recipes/semantics/run.py")
    check_installed("the study", MADE_WITH)
    out, of_task = Path(training.output_dir), by_task(task.task_kwargs, study.tasks)
    check_settings(out / SETTINGS, settings_of(model, task, prompt, training))

    # ---- Training -----------------------------------------------------------------------
    runs = []
    for seed in range(study.seeds):
        for name in study.tasks:
            folder = out / "runs" / f"{name.rpartition(':')[2]}-{seed}"
            runs.append(str(folder))
            if not (folder / PRIOR_CONFIG).is_file():  # written last
                print(f"\nTraining {folder.name} ({len(runs)} of {study.seeds * len(study.tasks)})", flush=True)
                own = copy.copy(task)
                # Evaluation rows are for the transfer matrix, with all other prompts.
                own.task, own.task_kwargs, own.num_eval = name, of_task.get(name, {}), 0
                train_one(seed, folder, model, own, prompt, training)

    # ---- Analysis and transfer ----------------------------------------------------------
    done = {"adapters": [sha256(Path(run, ADAPTER_WEIGHTS)) for run in runs]}
    done |= {name: getattr(study, name) for name in ("num_transfer", "num_analysis", "num_draws")}
    if not is_same(out / ANALYSED, done) or not (out / ANALYSIS).is_file():
        print("\nAnalysing the prompts", flush=True)
        base, tokenizer = base_model_from(copy.copy(model), best_device())
        rows = {
            name: load_task(
                name,
                data_dir=task.data_dir,
                num_eval=study.num_transfer,
                seed=task.split_seed,
                tokenizer=tokenizer,
                max_length=training.max_length,
                **of_task.get(name, {}),
            ).eval
            for name in study.tasks
        }
        analysis = analyze(
            runs, base, tokenizer, rows, num_draws=study.num_draws, describe=True, loss_rows=study.num_analysis,
            batch_size=study.eval_batch_size,
        )  # fmt: skip
        write_json(out / ANALYSIS, analysis)
        write_json(out / ANALYSED, done)
        del base
    print("\nMeasuring every prompt on every task", flush=True)
    transferred = transfer(
        runs,
        copy.copy(model),
        TransferArguments(
            tasks=study.tasks,
            out=str(out),
            data_dir=task.data_dir,
            task_kwargs=of_task,
            num_eval=study.num_transfer,
            split_seed=task.split_seed,
            max_length=training.max_length,
            batch_size=study.eval_batch_size,
        ),
    )

    # ---- The three questions ------------------------------------------------------------
    analysis = json.loads((out / ANALYSIS).read_text(encoding="utf-8"))
    sources = read_sources(runs)
    starts, prompts = (
        torch.stack([prompt.transpose(0, 1).flatten(1) for prompt in of])
        for of in ([source.initial for source in sources], [source.prompt for source in sources])
    )
    analysis["questions"] = questions(
        analysis, moves_of(starts, prompts, [adapter["task"] for adapter in analysis["adapters"]])
    )
    write_json(out / ANALYSIS, analysis)
    save_pictures(analysis, out)
    save_report(analysis, out / REPORT)
    print("\n".join(["", matrix_table(transferred), *findings(transferred)]))
    for part in analysis["questions"]:
        print(f"\n{part['question']}\n{part['answer']}")
    print(f"\n{out / REPORT}")


def train_one(
    seed: int,
    folder: Path,
    model: ModelArguments,
    task: TaskArguments,
    prompt: PromptArguments,
    training: TrainingArguments,
) -> None:
    """One run; it goes on from its last checkpoint, if it was stopped."""
    training = copy.copy(training)
    training.output_dir, training.seed, training.resume = str(folder), seed, True
    train(copy.copy(model), task, copy.copy(prompt), training)


def by_task(settings: dict[str, Any], tasks: list[str]) -> dict[str, dict[str, Any]]:
    """`task_kwargs` of each task by its full name."""
    found = {full_name(name): own for name, own in settings.items()}
    other = sorted(set(found) - set(tasks))
    if other:
        raise ValueError(f"task_kwargs must give settings by task, {', '.join(tasks)}, got {', '.join(other)}")
    return found


def settings_of(*given: Any) -> dict[str, Any]:
    """What the runs have in common, as JSON takes it; where data lies and which task it is may differ."""
    *others, training = given
    values = {name: getattr(training, name) for name in OF_TRAINING}
    for arguments in others:
        own = {item.name: getattr(arguments, item.name) for item in fields(arguments)}
        values |= {key: value for key, value in own.items() if key not in ("task", "data_dir", "num_eval")}
    return json.loads(json.dumps(values, default=str))


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Keep the runs' settings; refuse to mix runs of others among them."""
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = sorted(key for key in settings if kept.get(key) != settings[key])
        if other:
            raise ValueError(
                f"{other[0]} must be {kept.get(other[0])!r} like that of the runs in {path.parent}, got "
                f"{settings[other[0]]!r}: pass another output_dir, or delete that one"
            )
    else:
        write_json(path, settings)


def is_same(path: Path, value: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")) == value


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"run.py: {error}")
