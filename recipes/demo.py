"""What `make demo` runs: our default soft prompt beside stock PEFT's, on a real model and real questions.

The model comes out of a PyPI package and the questions out of DeepMind's generator, so no Hub is needed.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from peft import PromptTuningConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from priors_peft import (
    PriorConfig,
    PriorPeftModel,
    PriorTrainer,
    PriorTrainingArguments,
    get_prior_model,
    load_base_model,
)
from priors_peft.commands.evaluate import markdown_table
from priors_peft.data import IGNORED, tokenize
from priors_peft.evaluation import answer, best_device
from priors_peft.tasks import Task, load_task


MODEL = "bundled:smollm2-135m"
NUM_VIRTUAL_TOKENS = 20
# What trl's documentation suggests for prompt tuning.
STOCK_LEARNING_RATE = 1e-2


def settings(options: argparse.Namespace, name: str, **more: Any) -> dict[str, Any]:
    """Training arguments that are the same for both."""
    return {
        "output_dir": f"{options.output_dir}/{name}",
        "max_steps": options.steps,
        "per_device_train_batch_size": 8,
        "seed": options.seed,
        "logging_steps": 10,
        "save_strategy": "no",
    } | more


def train_stock(base: Any, tokenizer: Any, task: Task, options: argparse.Namespace) -> tuple[Any, float]:
    """Stock PEFT prompt tuning as it comes: start from N(0, 1)."""
    set_seed(options.seed)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL_TOKENS))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings(options, "stock", learning_rate=STOCK_LEARNING_RATE)),
        train_dataset=tokenize(task.train, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.train()
    return model, STOCK_LEARNING_RATE


def train_ours(base: Any, tokenizer: Any, task: Task, options: argparse.Namespace) -> tuple[Any, float]:
    """The same steps and batches with our defaults: the structured prior, a variational posterior, learning rate 0.3."""
    set_seed(options.seed)
    config = PriorConfig(num_virtual_tokens=NUM_VIRTUAL_TOKENS, seed=options.seed)
    model = get_prior_model(base, config, tokenizer=tokenizer)
    trainer = PriorTrainer(
        model=model,
        args=PriorTrainingArguments(**settings(options, "ours")),
        train_dataset=task.train,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return model, trainer.args.learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of data order and initial prompts")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of 8 questions")
    parser.add_argument("--output_dir", default="outputs/demo")
    options = parser.parse_args()

    # ---- Data and model -----------------------------------------------------------------
    task = load_task("math", module="arithmetic__add_or_sub", num_train=4000, num_eval=128)
    print(f"{len(task.train)} training questions, {len(task.eval)} held out. One of them: {task.eval[0]}")
    base, tokenizer = load_base_model(MODEL, device=best_device())

    # ---- Three ways to answer -----------------------------------------------------------
    rows = []

    def measure(name: str, model: Any, learning_rate: str, seconds: str, parameters: str) -> None:
        answers = answer(model, tokenizer, task.eval, task.max_new_tokens, batch_size=32, desc=f"Evaluating {name}")
        match = task.metrics(answers.predictions, answers.references)["exact_match"]
        rows.append([name, f"{answers.nll:.3f}", f"{match:.1%}", learning_rate, seconds, parameters])

    measure("no prompt", base, "", "", "0")
    ways: list[tuple[str, Callable]] = [("stock PEFT default", train_stock), ("priors_peft default", train_ours)]
    for name, train in ways:
        print(f"\nTraining: {name}")
        start = time.perf_counter()
        model, learning_rate = train(base, tokenizer, task, options)
        seconds = time.perf_counter() - start
        trainable = model.get_nb_trainable_parameters()[0]
        measure(name, model, f"{learning_rate:g}", f"{seconds:.0f} s", f"{trainable:,}")

    heads = ["", "NLL (nats/answer token)", "exact match", "learning rate", "training time", "trainable parameters"]
    print(f"\nHeld-out questions, {options.steps} steps of 8 questions, seed {options.seed}:\n")
    print(markdown_table(heads, rows))
    print("\nThe default learning rate of each was used: what the last row shows is a good result without tuning.")

    # ---- The saved adapter, loaded afresh -----------------------------------------------
    base, tokenizer = load_base_model(MODEL, device=best_device())
    model = PriorPeftModel.from_pretrained(base, f"{options.output_dir}/ours")
    few = task.eval.select(range(5))
    answers = answer(model, tokenizer, few, task.max_new_tokens, desc="Answering")
    print(f"\nThe adapter saved in {options.output_dir}/ours, loaded again:")
    for row, text in zip(few, answers.predictions, strict=True):
        verdict = "right" if text.strip() == row["completion"].strip() else f"wrong, it is{row['completion']}"
        print(f"  {row['prompt'].splitlines()[0]}\n    {text.strip()} ({verdict})")


if __name__ == "__main__":
    main()
