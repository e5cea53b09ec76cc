"""Does one learning rate do in whitened coordinates? Six rates on models whose embedding scales differ.

    python benchmarks/learning_rates.py --output outputs/learning_rates.jsonl

Beside the model itself stands the same model rescaled: its residual stream multiplied by 8 at every entrance, which
changes no output and only the scale that prompts live on. `--model` adds others. Resumable: a run whose line is in the
output is not repeated.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model, load_base_model
from priors_peft.commands.evaluate import markdown_table
from priors_peft.tasks import load_task


RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
COORDINATES = ("plain", "whitened")


@torch.no_grad()
def rescale(model: Any, factor: float) -> None:
    """Multiply a Llama's residual stream by `factor`; its final norm takes the factor out again."""
    embedding = model.get_input_embeddings().weight
    head = torch.nn.Linear(*reversed(embedding.shape), bias=False)
    head.weight = torch.nn.Parameter(embedding.clone())
    model.set_output_embeddings(head)
    model.config.tie_word_embeddings = False
    embedding.mul_(factor)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)


def short_training(
    model: Any, tokenizer: Any, rate: float, steps: int, seed: int = 42, **settings: Any
) -> dict[str, float]:
    """Held-out nats per answer token after a short training, and what it took; `settings` are `PriorTrainer`'s."""
    with tempfile.TemporaryDirectory() as folder:
        args = PriorTrainingArguments(
            output_dir=folder,
            learning_rate=rate,
            max_steps=steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            seed=seed,
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            report_to=[],
        )
        trainer = PriorTrainer(model=model, args=args, processing_class=tokenizer, **settings)
        start = time.process_time()
        trainer.train()
        return {"cpu_seconds": time.process_time() - start, "nll": trainer.evaluate()["eval_loss"]}


def run(name: str, coordinates: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """Held-out nats per answer token after a short training."""
    set_seed(0)
    path, _, factor = name.partition(" x")
    base, tokenizer = load_base_model(path)
    if factor:
        rescale(base, float(factor))
    task = load_task("math", num_train=4000, num_eval=128)
    config = PriorConfig(num_virtual_tokens=20, coordinates=coordinates, prior_weight=1.0)
    model = get_prior_model(base, config, tokenizer=tokenizer)
    trained = short_training(model, tokenizer, rate, options.steps, train_dataset=task.train, eval_dataset=task.eval)
    scale = base.get_input_embeddings().weight.std().item()
    return {"model": name, "scale": scale, "coordinates": coordinates, "rate": rate, "nll": trained["nll"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], help="another base model; may be repeated")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="outputs/learning_rates.jsonl")
    options = parser.parse_args()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    names = [*options.model, "bundled:smollm2-135m", "bundled:smollm2-135m x8"]
    for name in names:
        for coordinates in COORDINATES:
            for rate in RATES:
                wanted = (name, coordinates, rate)
                if any((one["model"], one["coordinates"], one["rate"]) == wanted for one in done):
                    continue
                done.append(run(*wanted, options))
                with output.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    rows = []
    for name in names:
        for coordinates in COORDINATES:
            found = {one["rate"]: one for one in done if (one["model"], one["coordinates"]) == (name, coordinates)}
            best = min(found, key=lambda rate: found[rate]["nll"])
            cells = [
                f"**{one['nll']:.3f}**" if rate == best else f"{one['nll']:.3f}" for rate, one in sorted(found.items())
            ]
            label = Path(name).name if Path(name).exists() else name
            rows.append([label, f"{found[best]['scale']:.3f}", coordinates, *cells])
    print(markdown_table(["model", "embedding scale", "coordinates", *(f"{rate:g}" for rate in RATES)], rows))


if __name__ == "__main__":
    main()
