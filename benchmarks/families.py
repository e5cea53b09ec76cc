"""What each family of priors does on one task: held-out likelihood at the start and after a short training.

    python benchmarks/families.py --output outputs/families.jsonl

SmolLM2-135M-Instruct, DeepMind MATH add_or_sub, 20 virtual tokens, default settings, soft. The empirical prior comes from
three prompts trained on another module (mul). Resumable: a run whose line is in the output is not repeated.
"""

import argparse
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

from transformers import set_seed

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model, load_base_model
from priors_peft.commands.evaluate import markdown_table
from priors_peft.tasks import load_task


DESCRIPTION = "Add or subtract the two numbers in the question and answer with the exact result, digits only."
SOURCES = [f"mul, seed {seed}" for seed in range(3)]
TARGETS = {
    "gaussian": {},
    "gaussian, N(0, 0.02²)": {"prior_kwargs": {"loc": 0.0, "scale": 0.02}},
    "structured": {},
    "structured, low_rank": {"prior_kwargs": {"structure": "low_rank"}},
    "exclusion, weight 0": {"prior_weight": 0.0},
    "interpolation, MATH and English": {},
    "text": {"prior_kwargs": {"text": DESCRIPTION}},
    "empirical, from mul": {},
}


def english() -> list[str]:
    """Plain English that every Python installation has: its own help texts."""
    return [part for text in pydoc_data.topics.topics.values() for part in text.split("\n\n") if len(part) > 80]


def settings_of(name: str, folder: Path) -> dict[str, Any]:
    """The configuration of one row."""
    settings: dict[str, Any] = {"prior": name.split(",")[0], **TARGETS[name]}
    if settings["prior"] == "interpolation":
        math = [row["prompt"] + row["completion"] for row in load_task("math", num_train=4000, num_eval=128).train]
        settings |= {"reference": "activations", "reference_kwargs": {"data": [math, english()]}}
    if settings["prior"] == "empirical":
        adapters = [str(folder / source) for source in SOURCES]
        settings |= {"reference": "adapters", "reference_kwargs": {"adapters": adapters}}
    return settings


def run(name: str, module: str, settings: dict[str, Any], seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one prompt; nats per answer token on 128 held-out questions before and after."""
    set_seed(seed)
    base, tokenizer = load_base_model("bundled:smollm2-135m")
    task = load_task("math", module=module, num_train=4000, num_eval=128)
    model = get_prior_model(
        base,
        PriorConfig(**{"num_virtual_tokens": 20, "seed": seed, "prior_weight": 1.0} | settings),
        tokenizer=tokenizer,
    )
    args = PriorTrainingArguments(
        output_dir=str(folder / name),
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        save_strategy="no",
        logging_steps=10,
        seed=seed,
    )
    trainer = PriorTrainer(
        model=model, args=args, train_dataset=task.train, eval_dataset=task.eval, processing_class=tokenizer
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    figures = {key.removeprefix("prior/"): value for key, value in last.items() if key.startswith("prior/")}
    return {"name": name, "steps": steps, "start": start, "nll": trainer.evaluate()["eval_loss"], **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="outputs/families.jsonl")
    options = parser.parse_args()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    for name in [*SOURCES, *TARGETS]:
        if any(one["name"] == name for one in done):
            continue
        if name in SOURCES:
            done.append(run(name, "arithmetic__mul", {}, SOURCES.index(name), options.steps, output.parent))
        else:
            settings = settings_of(name, output.parent)
            done.append(run(name, "arithmetic__add_or_sub", settings, 0, options.steps, output.parent))
        with output.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    heads = ["prior", "NLL at the start", f"after {options.steps} steps", "effective rank", "cosine", "drift (sd)"]
    keys = ("start", "nll", "effective_rank", "mean_pairwise_cosine", "drift")
    rows = [[one["name"], *(f"{one[key]:.3f}" for key in keys)] for one in done if one["name"] in TARGETS]
    print(markdown_table(heads, rows))


if __name__ == "__main__":
    main()
