"""With little data: our posteriors as they come beside stock PEFT tuned by hand and stopped in time.

`python benchmarks/low_data.py [--tasks ...] [--sizes ...] [--methods ...]` trains what is not in the results file yet, a
line of JSON a run, and prints the table; a run that was stopped is started again from its beginning.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from low_data_tables import draw, paired, table
from peft import PromptTuningConfig, PromptTuningInit, get_peft_model
from transformers import DataCollatorForSeq2Seq, EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

from priors_peft import (
    PriorConfig,
    PriorPeftModel,
    PriorTrainer,
    PriorTrainingArguments,
    get_prior_model,
    load_base_model,
)
from priors_peft.choices import metrics_by_likelihood
from priors_peft.data import IGNORED, tokenize
from priors_peft.evaluation import answer, best_device
from priors_peft.files import atomic_path
from priors_peft.inference.predictive import predict
from priors_peft.tasks import Task, load_task


# Name: the task as `load_task` takes it.
TASKS: dict[str, dict[str, Any]] = {
    "add_or_sub": {"name": "math", "module": "arithmetic__add_or_sub"},
    "linear_1d": {"name": "math", "module": "algebra__linear_1d"},
    "rte": {"name": "superglue:rte", "max_length": 200},
    "squad": {"name": "squad", "max_length": 128},
    "boolq": {"name": "superglue:boolq", "max_length": 200},
    "wic": {"name": "superglue:wic", "max_length": 200},
}
# What the empirical prior knows: other modules of MATH, each tuned on so many rows.
SOURCES = (
    "arithmetic__mul",
    "arithmetic__div",
    "algebra__linear_2d",
    "numbers__gcd",
    "numbers__round_number",
    "polynomials__evaluate",
)
SOURCE_ROWS, SOURCE_STEPS = 1000, 60
STOCK_RATES = (0.003, 0.01, 0.03, 0.1)
STOCK_DEFAULT_RATE = 0.01
HELD_OUT, MOST_HELD_OUT = 0.25, 64
PATIENCE = 3
EVALUATE_EVERY = 10

OURS: dict[str, dict[str, Any]] = {
    "map": {"inference": "map"},
    "variational": {"inference": "variational", "prior_weight": 0.01},
    "sghmc": {"inference": "sghmc", "prior_weight": 0.1},
    "laplace": {"inference": "laplace", "prior_weight": 1.0},
    "text": {"inference": "variational", "prior_weight": 0.01, "prior": "text"},
    "empirical": {"inference": "variational", "prior_weight": 0.01, "prior": "empirical", "reference": "adapters"},
}
METHODS = ["none", "stock default", "stock tuned", *OURS]
# Not in the grid: other temperatures of the variational posterior, what it was before it was a mixture, another optimizer.
VARIANTS = {f"variational {weight}": OURS["variational"] | {"prior_weight": weight} for weight in (0.003, 0.03, 0.1)}
VARIANTS["one Gaussian"] = OURS["variational"] | {"prior_weight": 0.03, "inference_kwargs": {"components": 1}}
VARIANTS["variational adafactor"] = VARIANTS["one Gaussian"] | {"optim": "adafactor"}


class Study:
    """The base model and what all runs have in common."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        device = best_device()
        self.base, self.tokenizer = load_base_model(options.model, device=device, dtype=getattr(torch, options.dtype))
        if device.type == "cpu":
            # In bfloat16 on a CPU this kernel takes longer than all matrices together, stock PEFT's and ours.
            torch.backends.cuda.enable_flash_sdp(options.dtype != "bfloat16")
        self._tasks: dict[str, Task] = {}

    def task(self, name: str) -> Task:
        if name not in self._tasks:
            settings = dict(TASKS[name])
            if self.options.data_dir and not settings["name"].startswith("math"):
                folder = settings["name"].partition(":")[0]
                settings["data_dir"] = str(Path(self.options.data_dir, folder))
            self._tasks[name] = load_task(
                settings.pop("name"), num_eval=self.options.num_eval, tokenizer=self.tokenizer, seed=0, **settings
            )
        return self._tasks[name]

    def rows(self, name: str, size: int, seed: int) -> Dataset:
        train = self.task(name).train
        if len(train) < size:
            raise ValueError(f"sizes must be at most {len(train)} for {name}, got {size}")
        return train.shuffle(seed=seed).select(range(size))

    def settings(self, folder: str, seed: int, **more: Any) -> dict[str, Any]:
        return {
            "output_dir": folder,
            "max_steps": self.options.steps,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 16,
            "seed": seed,
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": [],
        } | more

    def stock(
        self, rows: Dataset, seed: int, folder: str, rate: float, start: str, held_out: Dataset | None = None
    ) -> tuple[str, float]:
        """Stock PEFT and Trainer; with held-out rows the best state by them, and their NLL."""
        set_seed(seed)
        init = PromptTuningInit[start]
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init=init)
        model = get_peft_model(self.base, config)
        more: dict[str, Any] = {"learning_rate": rate}
        if held_out is not None:
            more |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": EVALUATE_EVERY}
            more |= {"save_steps": EVALUATE_EVERY, "save_total_limit": 1, "load_best_model_at_end": True}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**self.settings(folder, seed, **more)),
            train_dataset=tokenize(rows, self.tokenizer),
            eval_dataset=None if held_out is None else tokenize(held_out, self.tokenizer),
            data_collator=DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED),
            callbacks=[] if held_out is None else [EarlyStoppingCallback(PATIENCE)],
        )
        trainer.train()
        model.save_pretrained(f"{folder}/adapter")
        return f"{folder}/adapter", trainer.state.best_metric

    def run(self, task: str, size: int, seed: int, method: str) -> dict[str, Any]:
        """Train and measure; the figures of one line."""
        rows, whole = self.rows(task, size, seed), self.task(task)
        chosen: dict[str, Any] = {}
        if method == "empirical":
            self.sources()  # not in its time: one set serves all tasks
        start, start_cpu = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            if method == "none":
                model = self.base
            elif method == "stock default":
                path, _ = self.stock(rows, seed, folder, STOCK_DEFAULT_RATE, "RANDOM")
            elif method == "stock tuned":
                held_out = min(MOST_HELD_OUT, int(HELD_OUT * size))
                parts = rows.train_test_split(held_out, seed=seed)
                tried = []
                for rate in STOCK_RATES:
                    own = f"{folder}/{rate}"
                    path, loss = self.stock(parts["train"], seed, own, rate, "SAMPLE_VOCAB", parts["test"])
                    tried.append((loss, rate, path))
                loss, rate, path = min(tried)
                chosen = {"learning_rate": rate, "held_out_nll": loss}
            else:
                model = self.ours(method, rows, whole, seed, folder)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            if method.startswith("stock"):
                model = PriorPeftModel.from_pretrained(self.base, path)
            figures = self.measure(model, whole)
        run = {"task": task, "size": size, "seed": seed, "method": method, "dtype": self.options.dtype}
        return run | {"seconds": seconds, "cpu_seconds": cpu_seconds} | chosen | figures

    def ours(self, method: str, rows: Dataset, task: Task, seed: int, folder: str) -> PriorPeftModel:
        settings = dict((OURS | VARIANTS)[method])
        more = {"optim": settings.pop("optim")} if "optim" in settings else {}
        if settings.get("prior") == "text":
            # As wide as the vocabulary: around a description, not at it.
            settings["prior_kwargs"] = {"text": task.description, "spread": 1.0}
        if method == "empirical":
            settings["reference_kwargs"] = {"adapters": self.sources()}
        return self.trained(settings, rows, seed, folder, **more).model

    def trained(self, settings: dict[str, Any], rows: Dataset, seed: int, folder: str, **more: Any) -> PriorTrainer:
        set_seed(seed)
        config = PriorConfig(num_virtual_tokens=20, seed=seed, **settings)
        trainer = PriorTrainer(
            model=get_prior_model(self.base, config, tokenizer=self.tokenizer),
            args=PriorTrainingArguments(**self.settings(folder, seed, **more)),
            train_dataset=rows,
            processing_class=self.tokenizer,
        )
        trainer.train()
        return trainer

    def sources(self) -> list[str]:
        """Adapters of other tasks, trained once, beside the results."""
        folders = []
        for module in SOURCES:
            folder = Path(self.options.results).parent / "sources" / module
            if not (folder / "prior_config.json").is_file():
                rows = load_task("math", module=module, num_train=SOURCE_ROWS, num_eval=1).train
                trainer = self.trained(OURS["variational"], rows, 0, str(folder), max_steps=SOURCE_STEPS)
                trainer.save_model()
            folders.append(str(folder))
        return folders

    def measure(self, model: Any, task: Task) -> dict[str, float]:
        """Held-out likelihood, calibration and the task's own metric, averaged over draws where there are any.

        `alone` is what the adapter's one prompt gives, as stock PEFT reads it; `ece_chance` what `ece` would be of
        perfect calibration on as many tokens.
        """
        options, figures = self.options, {}
        if isinstance(model, PriorPeftModel):
            prediction: Any = predict(model, self.tokenizer, task.eval, options.num_draws)
            alone = predict(model, self.tokenizer, task.eval, 1)
            figures = {"nll_alone": alone.nll, "ece_alone": alone.calibration.error}
        else:
            prediction = answer(model, self.tokenizer, task.eval, 1)
        calibration = prediction.calibration
        figures |= {"nll": prediction.nll, "ece": calibration.error, "ece_chance": calibration.chance}
        averaged = model.averaged(options.num_draws) if isinstance(model, PriorPeftModel) else nullcontext()
        few = task.eval.select(range(min(options.num_answers, len(task.eval))))
        with averaged:
            if "choices" in task.eval.column_names:
                found = metrics_by_likelihood(task.metrics, model, self.tokenizer, few, 16)
            else:
                answers = answer(model, self.tokenizer, few, task.max_new_tokens)
                found = task.metrics(answers.predictions, answers.references)
        return figures | found


def plan(options: argparse.Namespace) -> Iterator[tuple[str, int, int, str]]:
    """The runs, the smallest sizes and first seeds of every task before more of any."""
    yield from product(options.tasks, options.sizes, options.seeds, options.methods)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--data_dir", help="folder with the published files of squad and superglue; else the Hub")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 128, 1024], help="training rows")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=[*METHODS, *VARIANTS])
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of 8 rows")
    parser.add_argument("--num_eval", type=int, default=128, help="held-out rows")
    parser.add_argument("--num_answers", type=int, default=64, help="of them to answer for the task's metric")
    parser.add_argument("--num_draws", type=int, default=8, help="prompts drawn from a posterior")
    parser.add_argument("--results", default="outputs/low_data.jsonl")
    parser.add_argument("--picture", type=Path, help="PNG of all results")
    options = parser.parse_args()

    results = Path(options.results)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(line["task"], line["size"], line["seed"], line["method"]) for line in lines}
    left = [run for run in plan(options) if run not in done]
    study = Study(options) if left else None
    for number, run in enumerate(left, 1):
        task, size, seed, method = run
        print(f"\n{number} of {len(left)}: {task}, {size} rows, seed {seed}, {method}", flush=True)
        lines.append(study.run(*run))
        with atomic_path(results) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(lines[-1], flush=True)
    gains = [paired(lines, method) for method in OURS]
    gains += [paired(lines, "variational", "one Gaussian"), paired(lines, "variational adafactor", "one Gaussian")]
    print("\n\n".join(["", table(lines, [*METHODS, *VARIANTS]), *filter(None, gains)]))
    if options.picture:
        draw(lines, list(TASKS), options.picture)


if __name__ == "__main__":
    main()
