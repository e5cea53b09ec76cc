"""K prompts trained at once beside K runs in a row: the time of one step of all, and the memory.

python benchmarks/several_prompts.py --count 4
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from side_by_side import base_model, batch, forget_peak, machine, pairs, ratio, resident

from priors_peft import PriorConfig, get_prior_model


MODEL, ROWS, LENGTH, VIRTUAL_TOKENS, SUPERVISED = "bundled:smollm2-135m", 8, 64, 20, 4


def build(count: int, options: argparse.Namespace) -> Any:
    """One model with `count` prompts."""
    config = PriorConfig(num_virtual_tokens=VIRTUAL_TOKENS, prior_weight=1.0)
    model = get_prior_model(base_model(MODEL, options.device, options.dtype), config, adapter_name="0")
    for index in range(1, count):
        model.add_adapter(str(index), PriorConfig(num_virtual_tokens=VIRTUAL_TOKENS, seed=index, prior_weight=1.0))
    for index in range(count):
        model.set_requires_grad(str(index), True)
    return model.train()


def at_once(model: Any, inputs: dict[str, torch.Tensor], count: int) -> None:
    """One step of all prompts on the same rows."""
    repeated = {name: part.repeat(count, 1) for name, part in inputs.items()}
    names = [str(index) for index in range(count) for _ in range(ROWS)]
    model(**repeated, adapter_names=names).loss.backward()


def in_a_row(model: Any, inputs: dict[str, torch.Tensor], count: int) -> None:
    """One step of each."""
    for index in range(count):
        model.active_adapter = str(index)
        model(**inputs).loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/several_prompts.jsonl"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--count", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--memory", choices=["at_once", "in_a_row"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    model = build(options.count, options)
    inputs = [
        batch([LENGTH] * ROWS, SUPERVISED, model.config.vocab_size, options.device, seed)
        for seed in range(options.pairs)
    ]
    ways = {"at_once": at_once, "in_a_row": in_a_row}
    if options.memory:
        before = forget_peak()
        ways[options.memory](model, inputs[0], options.count)
        print((resident("VmHWM") - before) / 2**20)
        return
    timed = pairs(
        lambda i: in_a_row(model, inputs[i], options.count),
        lambda i: at_once(model, inputs[i], options.count),
        options.pairs,
        options.device,
    )
    result: dict[str, Any] = ratio(timed)
    result = {"count": options.count, "in_a_row_s": result.pop("stock_s"), "at_once_s": result.pop("ours_s"), **result}
    for way in ways:
        output = subprocess.check_output([sys.executable, *sys.argv, "--memory", way], text=True)
        result[f"{way}_peak_mib_over_model"] = float(output.splitlines()[-1])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**result, **machine(options.device)})
    with options.output.open("a") as file:
        file.write(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
