"""What is known of a training, collected as it goes: `training.json` beside the adapter, which cards are made from."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_json
from .adapter import read_json
from .base_model import BUNDLED, hub_id
from .markdown import scrub


TRAINING = "training.json"
FORMAT_VERSION = 1

# Of all training arguments those that the result depends on. A list of what may be said: others hold names of this
# machine, folders and tokens.
SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "prior_weight_schedule",
    "max_length",
    "max_new_tokens",
    "train_sampling_strategy",
    "activation_checkpointing",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "eval_strategy",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "greater_is_better",
    "early_stopping_patience",
)
# Told where they are not their defaults.
UNUSUAL = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs")
# What evaluation logs besides a task's own figures.
_TIMINGS = ("runtime", "per_second", "preparation_time")


@dataclass
class TrainingFacts:
    """What a training leaves for its card; None, or empty, is what is not known.

    Args:
        base_model: The base model's Hub id, or the bundled model's name; None for a folder.
        steps: Optimizer steps that the prompt was trained for.
        epochs: Passes over the training rows.
        num_rows: Training rows.
        num_supervised_tokens: N of the objective, tokens of their answers.
        num_eval_rows: Evaluation rows.
        num_processes: Processes that shared a batch.
        device: What it ran on, without the machine's name.
        dtype: Of the base model's weights.
        seconds: What the training took.
        settings: The training arguments among `SETTINGS`.
        learning_rates: Of each prompt.
        results: Figures of each prompt on the evaluation rows; `loss` is in nats per answer token.
        initial_results: The same of the prompt before training.
        posterior_draws: Prompts drawn from the posterior that `results` average; None where it is a point.
        mean_results: Of each prompt with a posterior, `loss` and `ece` of the one that stands for it.
        calibration: What each `ece` is of, see `calibration.Calibration`, by the prompt's name, or `NAME alone`
            without averaging; of several evaluation sets with `, PART` after it.
        datasets: Hub ids of the training data.
        recipe: What `priors-peft train` was given, flag by flag.
        repo_id: Where it was pushed to last.
    """

    base_model: str | None = None
    steps: int | None = None
    epochs: float | None = None
    num_rows: int | None = None
    num_supervised_tokens: int | None = None
    num_eval_rows: int | None = None
    num_processes: int | None = None
    device: str | None = None
    dtype: str | None = None
    seconds: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    initial_results: dict[str, dict[str, float]] = field(default_factory=dict)
    posterior_draws: int | None = None
    mean_results: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)
    repo_id: str | None = None

    def save(self, folder: str | os.PathLike) -> None:
        """Write `training.json`, without tokens."""
        values = {"format_version": FORMAT_VERSION} | asdict(self)
        write_json(Path(folder, TRAINING), json.loads(scrub(json.dumps(values, ensure_ascii=False))))


def read_facts(folder: str | os.PathLike) -> TrainingFacts:
    """The facts in a folder's `training.json`; nothing is known where there is none.

    Raises:
        ValueError: The file is damaged, or of another format version.
    """
    path = Path(folder, TRAINING)
    if not path.is_file():
        return TrainingFacts()
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"format_version must be {FORMAT_VERSION} in {path}, got {values.get('format_version')!r}: update "
            "priors_peft, or delete the file for a card without it"
        )
    known = {item.name for item in fields(TrainingFacts)}
    return TrainingFacts(**{name: value for name, value in values.items() if name in known})


def collect_facts(
    trainer: Any, evaluation: Mapping[str, float] | None = None, before: Mapping[str, float] | None = None
) -> TrainingFacts:
    """What a `PriorTrainer` knows now.

    Args:
        trainer: The trainer.
        evaluation: Figures of the prompt as it is, if it was evaluated after training; else those of its step count.
        before: Figures of the prompt before training, if it was evaluated then; else those that were logged at step 0.
    """
    args, state, names = trainer.args, trainer.state, trainer.adapter_names
    config = trainer.model.peft_config[names[0]]
    best = state.best_global_step if args.load_best_model_at_end and not trainer.is_in_train else None
    step = state.global_step if best is None else best
    evaluations = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    is_point = all(trainer.model.prompt_encoder[name].posterior is None for name in names)
    logged = [] if trainer.inference.late and not is_point else evaluations
    now = evaluation or next((entry for entry in logged if entry.get("step") == step), {})
    start = before or next((entry for entry in evaluations if entry.get("step") == 0), {})
    runtimes = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return TrainingFacts(
        base_model=public_name(config.base_model_name_or_path),
        steps=step,
        epochs=state.epoch if best is None else None,
        num_rows=_length(trainer.train_dataset),
        num_supervised_tokens=trainer.num_supervised_tokens,
        num_eval_rows=None if isinstance(trainer.eval_dataset, dict) else _length(trainer.eval_dataset),
        num_processes=args.world_size,
        device=_device(args.device),
        dtype=str(trainer.model.dtype).removeprefix("torch."),
        seconds=runtimes[-1] if runtimes else None,
        settings=_settings(args),
        learning_rates=dict(trainer.learning_rates),
        results=by_prompt(now, names),
        initial_results={} if step == 0 else by_prompt(start, names),
        posterior_draws=None if is_point or args.posterior_draws == 1 else args.posterior_draws,
        datasets=_hub_sources(trainer.train_dataset),
        recipe=dict(trainer.recipe),
        repo_id=trainer.hub_model_id,
    )


def _settings(args: Any) -> dict[str, Any]:
    told = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    usual = {item.name: item.default for item in fields(args)}
    told |= {name: getattr(args, name) for name in UNUSUAL if getattr(args, name) not in (usual[name], {})}
    return public_value(told)


def public_name(name: str | None) -> str | None:
    """A base model's name if it means something elsewhere: a Hub id, or the bundled model's name."""
    return name if name == BUNDLED else hub_id(name)


def public_value(value: Any) -> Any:
    """A setting without folders of this machine: of a path its last part is left."""
    if isinstance(value, Mapping):
        return {str(name): public_value(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(one) for one in value]
    if hasattr(value, "value"):  # an enumeration's
        return value.value
    if isinstance(value, (bool, int, float, type(None))):
        return value
    text = str(value)
    if not re.search(r"\s", text) and _is_place(text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text


def _is_place(text: str) -> bool:
    try:
        exists = Path(text).exists()
    except OSError:  # too long for a name
        exists = False
    return exists or re.match(r"[/~\\]|[A-Za-z]:[/\\]|\.\.?[/\\]|file:", text) is not None


def _length(rows: Any) -> int | None:
    return len(rows) if rows is not None and hasattr(rows, "__len__") else None


def _device(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def by_prompt(figures: Mapping[str, float], names: list[str]) -> dict[str, dict[str, float]]:
    """Evaluation's figures without their prefix and timings, prompt by prompt."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        metric, _, name = key.removeprefix("eval_").partition("/")
        if not key.startswith("eval_") or metric.endswith(_TIMINGS) or not isinstance(value, (int, float)):
            continue
        if name in names or (not name and len(names) == 1):
            found.setdefault(name or names[0], {})[metric] = float(value)
    return found


def _hub_sources(dataset: Any) -> list[str]:
    """Hub ids that `datasets` remembers a data set was loaded from."""
    checksums = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [re.match(r"hf://datasets/([^/@]+/[^/@]+)@", str(source)) for source in checksums]
    return sorted({match.group(1) for match in found if match})
