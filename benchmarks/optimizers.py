"""Does an optimizer beat AdamW on prompts? Each at the best of three learning rates, then over seeds.

    python benchmarks/optimizers.py --output outputs/optimizers.jsonl

Rates are compared by held-out rows that the table does not use. Resumable: a run whose line is in the output is not
repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from learning_rates import short_training
from torch.optim import SGD, Adafactor, AdamW, Muon, Optimizer
from transformers import set_seed

from priors_peft import PriorConfig, get_prior_model, load_base_model
from priors_peft.commands.evaluate import markdown_table
from priors_peft.evaluation import best_device
from priors_peft.tasks import load_task


TASKS = ("arithmetic__add_or_sub", "algebra__linear_1d")
# In whitened coordinates, whose metric is the prior's, a step of SGD is a natural-gradient step.
RATES = {
    "AdamW": (0.1, 0.3, 1.0),
    "Adafactor": (0.1, 0.3, 1.0),
    "Muon": (0.3, 1.0, 3.0),
    "natural gradient": (10.0, 30.0, 100.0),
}
TUNING_SEED = 100


class MatrixMuon(Muon):
    """Muon on a soft prompt's one matrix `[P, d]`, which is a part of its parameter `[1, P, d]`."""

    def __init__(self, parameter: torch.nn.Parameter, rate: float) -> None:
        self.whole = parameter
        matrix = torch.nn.Parameter(parameter.data[0])
        super().__init__([matrix], lr=rate, weight_decay=0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        """One step."""
        assert self.whole.grad is not None
        self.param_groups[0]["params"][0].grad = self.whole.grad[0]
        return super().step(closure)


def optimizer_of(name: str, parameter: torch.nn.Parameter, rate: float) -> Optimizer:
    """The optimizer of that name."""
    if name == "AdamW":
        return AdamW([parameter], lr=rate, weight_decay=0)
    if name == "Adafactor":
        return Adafactor([parameter], lr=rate)
    if name == "Muon":
        return MatrixMuon(parameter, rate)
    return SGD([parameter], lr=rate, momentum=0.9)


class Study:
    """The base model and the tasks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        dtype = getattr(torch, options.dtype)
        self.base, self.tokenizer = load_base_model(options.model, device=best_device(), dtype=dtype)
        if best_device().type == "cpu":
            # In bfloat16 on a CPU this kernel takes longer than all matrices together.
            torch.backends.cuda.enable_flash_sdp(options.dtype != "bfloat16")
        self.tasks = {
            name: load_task("math", module=name, num_train=4000, num_eval=options.num_eval) for name in options.tasks
        }

    def run(self, module: str, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Held-out nats per answer token: on the first half of the rows while rates are compared, else on the second."""
        task, options = self.tasks[module], self.options
        half = len(task.eval) // 2
        held_out = task.eval.select(range(half) if seed == TUNING_SEED else range(half, len(task.eval)))
        set_seed(seed)
        config = PriorConfig(num_virtual_tokens=20, seed=seed, inference="map", prior_weight=1.0)
        model = get_prior_model(self.base, config, tokenizer=self.tokenizer)
        optimizer = optimizer_of(name, model.prompt_encoder["default"].coordinate, rate)
        rows = {"train_dataset": task.train, "eval_dataset": held_out}
        trained = short_training(
            model, self.tokenizer, rate, options.steps, seed, optimizers=(optimizer, None), **rows
        )
        run = {"task": module, "optimizer": name, "rate": rate, "seed": seed, "steps": options.steps}
        return run | {"dtype": options.dtype} | trained


def best_rate(lines: list[dict[str, Any]], module: str, name: str) -> float:
    """The rate of least held-out NLL."""
    tried = [line for line in lines if (line["task"], line["optimizer"], line["seed"]) == (module, name, TUNING_SEED)]
    return min(tried, key=lambda line: line["nll"])["rate"]


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, a row an optimizer."""
    rows = []
    for module in TASKS:
        for name in RATES:
            group = [line for line in lines if (line["task"], line["optimizer"]) == (module, name)]
            group = [line for line in group if line["seed"] != TUNING_SEED]
            if len(group) > 1:
                nlls = [line["nll"] for line in group]
                figure = f"{statistics.mean(nlls):.3f} ± {statistics.stdev(nlls):.3f}"
                seconds = statistics.mean(line["cpu_seconds"] for line in group)
                rows.append([module, name, f"{group[0]['rate']:g}", str(len(group)), figure, f"{seconds:.0f}"])
    return markdown_table(["task", "optimizer", "rate", "seeds", "held-out nats/token", "CPU seconds"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bundled:smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument(
        "--num_eval", type=int, default=256, help="held-out questions, half of them to choose rates by"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="outputs/optimizers.jsonl")
    options = parser.parse_args()
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    study = None
    for module in options.tasks:
        for name in options.optimizers:
            rates = RATES[name]
            for seed in (TUNING_SEED, *range(options.seeds)):
                for rate in rates if seed == TUNING_SEED else [best_rate(lines, module, name)]:
                    wanted = (module, name, rate, seed)
                    if any((one["task"], one["optimizer"], one["rate"], one["seed"]) == wanted for one in lines):
                        continue
                    study = study or Study(options)
                    lines.append(study.run(*wanted))
                    with output.open("a") as file:
                        file.write(json.dumps(lines[-1]) + "\n")
                    print(lines[-1], flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
