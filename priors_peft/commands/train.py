"""`priors-peft train`, the same as `recipes/train.py`: base model, task, prompt, training, evaluation, saving."""

import gc
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, set_seed

from ..checkpoints import last_checkpoint
from ..config import PriorConfig
from ..evaluation import answer_metrics
from ..files import write_json
from ..hub.adapter import TASK_FILE
from ..hub.base_model import hub_id, load_base_model
from ..hub.facts import SETTINGS, public_name, public_value
from ..model import get_prior_model
from ..tasks import Task, load_task
from ..trainer import PriorTrainer
from ..training_arguments import PriorTrainingArguments
from .arguments import ModelArguments, PromptArguments, TaskArguments, parse


PLACES = ("data_dir", "train_file", "eval_file")


@dataclass
class TrainingArguments(PriorTrainingArguments):
    """`PriorTrainingArguments` with the two settings that need a callback or an argument of `train`."""

    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better one"}
    )
    max_new_tokens: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Most tokens generated for an answer in evaluation; the task's own if unset"}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in output_dir, if any"})


def main(arguments: list[str]) -> None:
    """Train one prompt; the adapter is at the root of `output_dir`."""
    dataclasses = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
    train(*parse(dataclasses, arguments, "priors-peft train"))
    end_together()


def end_together() -> None:
    """Let all processes end at one time."""
    # Processes that exit one after another, or that free a model after its process group, now and then abort or hang
    # under gloo: free it first, then end together.
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def train(
    model_arguments: ModelArguments,
    task_arguments: TaskArguments,
    prompt_arguments: PromptArguments,
    args: TrainingArguments,
    loaded: tuple[Any, Any] | None = None,
) -> dict[str, float]:
    """Train, evaluate and save; returns the evaluation's figures.

    `loaded` is the base model and its tokenizer, where one that was loaded before serves; training leaves it as it was.
    """
    # ---- Model and task -----------------------------------------------------------------
    recipe = recipe_of(model_arguments, task_arguments, prompt_arguments, args)
    set_seed(args.seed)
    base, tokenizer = loaded or base_model_from(model_arguments)
    room = args.max_length or room_for_text(base, prompt_arguments.num_virtual_tokens)
    task = task_from(task_arguments, tokenizer, room)

    # ---- Prompt -------------------------------------------------------------------------
    settings = vars(prompt_arguments) | {
        "prior_kwargs": prior_settings(prompt_arguments, task),
        "reference_kwargs": reference_data(prompt_arguments, task),
    }
    config = PriorConfig(seed=args.seed, **settings)
    model = get_prior_model(base, config, tokenizer=tokenizer)
    model.print_trainable_parameters()

    # ---- Training -----------------------------------------------------------------------
    # Without a name trackio makes one up for the training and another for the evaluation after it.
    args.run_name = args.run_name or Path(args.output_dir).resolve().name
    args.max_new_tokens = args.max_new_tokens or task.max_new_tokens
    if args.early_stopping_patience is not None:
        if args.eval_strategy == "no":
            raise ValueError("eval_strategy must be steps or epoch for early_stopping_patience, got no")
        args.metric_for_best_model = args.metric_for_best_model or "loss"
        args.greater_is_better = bool(args.greater_is_better)
    trainer = PriorTrainer(
        model=model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.eval,
        processing_class=tokenizer,
        compute_metrics=None
        if args.prediction_loss_only
        else answer_metrics(
            tokenizer, task.metrics, task.eval, model, args.per_device_eval_batch_size, args.max_length
        ),
    )
    if args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    trainer.recipe = recipe
    if args.should_save:
        write_json(Path(args.output_dir, TASK_FILE), task_facts(task_arguments, task))
    checkpoint = args.resume_from_checkpoint or (last_checkpoint(args.output_dir) if args.resume else None)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.log_metrics("train", result.metrics)

    # ---- Evaluation and saving ----------------------------------------------------------
    trainer.save_model(_internal_call=True)  # pushed at the end, with the evaluation
    trainer.save_state()
    metrics: dict[str, float] = {}
    if task.eval is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics, combined=False)
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def room_for_text(base: Any, num_virtual_tokens: int) -> int | None:
    """Tokens of the base model's window that a prompt leaves to a row; None if the window is not known."""
    context = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    return context and context - num_virtual_tokens


def task_from(arguments: TaskArguments, tokenizer: Any, max_length: int | None) -> Task:
    """The task that the flags name, its rows within `max_length`; a file or a data set alone means `completions`."""
    given = {name: getattr(arguments, name) for name in ("train_file", "eval_file", "dataset")}
    given = {name: value for name, value in given.items() if value is not None}
    name = arguments.task or ("completions" if given else None)
    if name is None:
        raise ValueError("task, train_file or dataset must be given, got none of them")
    settings: dict[str, Any] = dict(arguments.task_kwargs or {})  # type: ignore[arg-type]
    if name == "completions":
        columns = {"prompt_column": arguments.prompt_column, "completion_column": arguments.completion_column}
        settings = {**given, **columns, **settings}
    elif given:
        raise ValueError(f"{next(iter(given))} must not be given with task={name!r}: use task=completions or data_dir")
    for key in ("num_train", "num_eval", "data_dir"):
        if getattr(arguments, key) is not None:
            settings[key] = getattr(arguments, key)
    settings.setdefault("max_length", max_length)
    return load_task(name, seed=arguments.split_seed, tokenizer=tokenizer, **settings)


def task_facts(arguments: TaskArguments, task: Task) -> dict[str, Any]:
    """What an adapter's folder tells of what it was trained on, but not where the files lay."""
    return {
        "task": task.name,
        "task_kwargs": public_value(_without_places(arguments.task_kwargs or {})),  # type: ignore[arg-type]
        "split_seed": arguments.split_seed,
        "num_train": len(task.train),
        "num_eval": 0 if task.eval is None else len(task.eval),
        "dataset": hub_id(task.dataset),
        "template": task.template,
        "description": task.description,
        "max_new_tokens": task.max_new_tokens,
    }


def recipe_of(*arguments: Any) -> dict[str, Any]:
    """The flags that give these arguments again, where they differ from the defaults; no folders of this machine."""
    recipe: dict[str, Any] = {}
    for given in arguments:
        known = [item for item in fields(given) if item.init and item.name not in PLACES]
        if isinstance(given, TrainingArguments):
            defaults = {item.name: item.default for item in known if item.name in SETTINGS}
        else:
            empty = type(given)()
            defaults = {item.name: getattr(empty, item.name) for item in known}
        for name, default in defaults.items():
            value = getattr(given, name)
            if name in ("model", "dataset"):
                value = public_name(value)
            elif isinstance(value, dict):
                value = _without_places(value)
            if value not in (default, None) and not (value is False and default is None):
                recipe[name] = public_value(value)
    return recipe


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in PLACES}


def prior_settings(arguments: PromptArguments, task: Task) -> dict[str, Any]:
    """`prior_kwargs`; a text prior without a text is about the task's own description."""
    settings: dict[str, Any] = dict(arguments.prior_kwargs or {})  # type: ignore[arg-type]
    if arguments.prior == "text" and task.description:
        settings.setdefault("text", task.description)
    return settings


def reference_data(arguments: PromptArguments, task: Task) -> dict[str, Any]:
    """`reference_kwargs` with tasks by name turned into their training rows; activations are the task's own if none."""
    settings: dict[str, Any] = dict(arguments.reference_kwargs or {})  # type: ignore[arg-type]
    tasks = settings.pop("tasks", None)
    if tasks is not None:
        of_task = tasks if isinstance(tasks, dict) else dict.fromkeys(tasks, {})
        wanted = 2 if arguments.prior == "interpolation" else 1
        if len(of_task) != wanted:
            raise ValueError(
                f"reference_kwargs must name {wanted} in tasks for prior={arguments.prior!r}, got {list(of_task)}"
            )
        rows = [load_task(name, **own).train for name, own in of_task.items()]
        settings["data"] = rows if wanted == 2 else rows[0]
    elif arguments.reference == "activations" and arguments.prior != "interpolation":
        settings.setdefault("data", task.train)
    return settings


def base_model_from(arguments: ModelArguments, device: Any = None) -> tuple[Any, Any]:
    """The base model and tokenizer that the flags name; a Trainer moves the model itself."""
    if not arguments.model:
        raise ValueError("model must be given: a Hub id, a folder, or bundled:smollm2-135m")
    return load_base_model(
        arguments.model,
        dtype=dtype_from(arguments.dtype),
        device=device,
        revision=arguments.model_revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def dtype_from(name: str | None) -> torch.dtype | None:
    """The type of weights that a flag names."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}
    if name not in dtypes:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {name!r}")
    return dtypes[name]
