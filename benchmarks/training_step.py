"""A training step beside stock PEFT's: same model, same batch, same gradient, in turn in one process.

    python benchmarks/training_step.py --output outputs/training_step.jsonl            # the table
    python benchmarks/training_step.py --output outputs/training_step.jsonl --sweep    # by prompt and text length
    python benchmarks/training_step.py --output outputs/training_step.jsonl --memory   # peak memory, fresh processes
    python benchmarks/training_step.py --profile                                       # where our time goes

RTE and SQuAD come from the Hub, or from `--data_dir` (subfolders `superglue` and `squad`). `--device cuda --dtype
bfloat16` runs the same on a GPU. Resumable: a row that is in the output is not measured again.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from side_by_side import (
    base_model,
    batch,
    forget_peak,
    machine,
    matmul_rate,
    ours,
    pairs,
    ratio,
    resident,
    seconds,
    stock_twin,
)
from tqdm.auto import tqdm

from priors_peft import load_base_model
from priors_peft.data import IGNORED, pad, padded_text, tokenize
from priors_peft.tasks import load_task


SMOLLM = "bundled:smollm2-135m"
# model, rows, tokens a row, virtual tokens, supervised tokens a row
FIXED = [
    (SMOLLM, 8, 64, 100, 4),
    (SMOLLM, 8, 64, 20, 4),
    (SMOLLM, 4, 256, 20, 8),
    ("gpt2", 8, 64, 100, 4),
    ("bloomz-560m", 4, 64, 50, 4),
    # where the least is to be gained: hardly a prompt, every position supervised
    (SMOLLM, 8, 64, 1, 64),
    (SMOLLM, 8, 64, 5, 64),
    ("bloomz-560m", 4, 64, 1, 64),
]
ON_GPU = [("llama-3.2-1b", 8, 64, 100, 4), ("llama-3.2-1b", 8, 64, 20, 4), ("llama-3.2-1b", 8, 256, 20, 8)]
REAL = ("rte", "squad")
SWEEP = [(SMOLLM, 8, 64, count, 4) for count in (1, 5, 10, 20, 50, 100, 200)] + [
    (SMOLLM, 8, length, 20, 4) for length in (16, 32, 128, 256)
]


def step(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Forward and backward; the prompt's gradient."""
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = None
    model(**inputs).loss.backward()
    return parameter.grad


def check(stock: Any, tuned: Any, inputs: dict[str, Any], tolerance: float) -> float:
    """Relative difference of the two gradients, which must be small."""
    theirs, own = step(stock, inputs).flatten(), step(tuned, inputs).flatten()
    difference = float((own - theirs).norm() / theirs.norm())
    if not difference < tolerance:
        raise AssertionError(f"the gradients must be equal, got a relative difference of {difference}")
    return difference


def fixed(case: tuple, options: argparse.Namespace) -> dict[str, Any]:
    """Equal rows of random tokens."""
    name, rows, length, count, supervised = case
    base = base_model(name, options.device, options.dtype)
    tuned = ours(base, count).train()
    stock = stock_twin(base, tuned.prompt_encoder["default"]()[0]).train()
    inputs = [
        batch([length] * rows, supervised, base.config.vocab_size, options.device, seed)
        for seed in range(options.pairs)
    ]
    difference = check(stock, tuned, inputs[0], 1e-3 if options.dtype == torch.float32 else 0.1)
    timed = pairs(lambda i: step(stock, inputs[i]), lambda i: step(tuned, inputs[i]), options.pairs, options.device)
    return {**ratio(timed), "difference": difference, "text_tokens": rows * length}


def real(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of a task as they come, eight a batch, 20 virtual tokens; stock also with batches grouped by length."""
    base = base_model(SMOLLM, options.device, options.dtype)
    tokenizer = load_base_model(SMOLLM)[1]
    folder = options.data_dir and str(Path(options.data_dir) / ("squad" if name == "squad" else "superglue"))
    settings = {} if name == "squad" else {"subtask": name}
    task = load_task("squad" if name == "squad" else "superglue", data_dir=folder, num_train=2000, **settings)
    rows = list(tokenize(task.train, tokenizer))
    order = random.Random(0).sample(range(len(rows)), 8 * options.pairs)
    as_they_come = [order[start : start + 8] for start in range(0, len(order), 8)]
    # The same rows in the batches that grouping by length makes of them.
    by_length = sorted(order, key=lambda index: len(rows[index]["input_ids"]))
    grouped = [by_length[start : start + 8] for start in range(0, len(order), 8)]
    tuned = ours(base, 20).train()
    stock = stock_twin(base, tuned.prompt_encoder["default"]()[0]).train()

    def collate(indices: list[int]) -> dict[str, torch.Tensor]:
        text = padded_text(
            [rows[index]["input_ids"] for index in indices], tokenizer.pad_token_id, "right", options.device
        )
        return text | {
            "labels": pad([rows[index]["labels"] for index in indices], IGNORED, "right").to(options.device)
        }

    inputs, in_groups = ([collate(indices) for indices in part] for part in (as_they_come, grouped))
    difference = check(stock, tuned, inputs[0], 1e-3 if options.dtype == torch.float32 else 0.1)
    timed = pairs(lambda i: step(stock, inputs[i]), lambda i: step(tuned, inputs[i]), options.pairs, options.device)
    by_group = pairs(
        lambda i: step(stock, in_groups[i]), lambda i: step(tuned, in_groups[i]), options.pairs, options.device
    )
    sums = [sum(part) for part in zip(*timed, strict=True)] + [sum(part) for part in zip(*by_group, strict=True)]
    kept = sum(int(part["attention_mask"].sum()) for part in inputs)
    return {
        **ratio(timed),
        "difference": difference,
        "text_tokens": kept / options.pairs,
        "padding": 1 - kept / sum(part["attention_mask"].numel() for part in inputs),
        # Times of all batches, which are the same rows either way.
        "ratio_of_sums": sums[0] / sums[1],
        "stock_grouped_over_ours_as_they_come": sums[2] / sums[1],
        "stock_grouped_over_ours_grouped": sums[2] / sums[3],
    }


def memory(side: str, options: argparse.Namespace) -> None:
    """Peak memory of three steps over the model's own, in this process."""
    name, rows, length, count, supervised = FIXED[4]
    base = base_model(name, options.device, options.dtype)
    tuned = ours(base, count).train()
    model = tuned if side == "ours" else stock_twin(base, tuned.prompt_encoder["default"]()[0]).train()
    inputs = batch([length] * rows, supervised, base.config.vocab_size, options.device, 0)
    if options.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        # What is mapped is counted once it was touched; and building the model and its prior peaked on its own.
        sum(float(part.sum()) for part in model.parameters())
        before = forget_peak()
    for _ in range(3):
        step(model, inputs)
    if options.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resident("VmHWM")
    print(json.dumps({"mib": (peak - before) / 2**20}))


def profile(options: argparse.Namespace) -> None:
    """Self times of one step by kind, and how near the matrix products come to the machine's rate."""
    name, rows, length, count, supervised = FIXED[1]
    base = base_model(name, options.device, options.dtype)
    inputs = batch([length] * rows, supervised, base.config.vocab_size, options.device, 0)
    width, inner = base.config.hidden_size, base.config.intermediate_size
    rate = matmul_rate(width, inner, rows * length, options.device, options.dtype)
    tuned = ours(base, count).train()
    for side, model in (("ours", tuned), ("stock", stock_twin(base, tuned.prompt_encoder["default"]()[0]).train())):
        step(model, inputs)
        taken = seconds(lambda model=model: step(model, inputs), options.device)  # type: ignore[misc]
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, with_flops=True) as recorded:
            step(model, inputs)
        events = recorded.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        kinds = {
            "matrix products": ("mm", "addmm", "bmm"),
            "attention": ("scaled_dot_product",),
            "softmax": ("softmax",),
        }
        print(f"{side}: a step takes {taken:.2f} s; the machine multiplies at {rate / 1e9:.0f} GFLOP/s")
        for kind, parts in kinds.items():
            chosen = [event for event in events if any(part in event.key for part in parts)]
            share = sum(event.self_cpu_time_total for event in chosen) / total
            flops = sum(event.flops for event in chosen)
            speed = f", {flops / (share * taken) / 1e9:.0f} GFLOP/s" if flops else ""
            print(f"  {kind:16} {share:6.1%}{speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/training_step.jsonl"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--data_dir")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", nargs="?", const="both", choices=["both", "ours", "stock"])
    options = parser.parse_args()
    if options.memory in ("ours", "stock"):
        return memory(options.memory, options)
    if options.profile:
        return profile(options)
    cases: list[Any] = SWEEP if options.sweep else FIXED + (ON_GPU if options.device.type == "cuda" else []) + [*REAL]
    if options.memory:
        cases = ["memory"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    done = options.output.read_text().splitlines() if options.output.exists() else []
    known = {json.dumps(json.loads(line)["case"]) for line in done}
    for case in tqdm(cases, desc="Cases"):
        label = [*(case if isinstance(case, tuple) else [case]), str(options.device), str(options.dtype)]
        if json.dumps(label) in known:
            continue
        if case == "memory":
            command = [sys.executable, *sys.argv]
            sides = {side: json.loads(subprocess.check_output([*command, side]))["mib"] for side in ("stock", "ours")}
            result: dict[str, Any] = {"stock_mib": sides["stock"], "ours_mib": sides["ours"]}
        else:
            result = fixed(case, options) if isinstance(case, tuple) else real(case, options)
        line = json.dumps({"case": label, **result, **machine(options.device)})
        with options.output.open("a") as file:
            file.write(line + "\n")
        tqdm.write(line)


if __name__ == "__main__":
    main()
