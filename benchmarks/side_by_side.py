"""What the benchmarks share: models by shape, stock PEFT beside ours, paired timings, the machine's own rate."""

import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from priors_peft import PriorConfig, get_prior_model, load_base_model


# Published architectures with random weights: a step takes as long whatever the weights are.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "bloomz-560m": {
        "model_type": "bloom",
        "hidden_size": 1024,
        "n_layer": 24,
        "n_head": 16,
        "vocab_size": 250_880,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}


def base_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A model by its Hub id or folder, or one of `SHAPES` with random weights."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if name in SHAPES:
        settings = dict(SHAPES[name])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    else:
        model, _ = load_base_model(name, dtype=dtype)
    # Dropout draws would differ, and cost both sides the same.
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    return model.to(device)


def stock_twin(model: Any, prompt: Tensor) -> Any:
    """Stock PEFT on the same base model, with the same prompt."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt))
    stock = get_peft_model(model, config)
    weight = stock.prompt_encoder["default"].embedding.weight
    weight.data = prompt.detach().to(weight)
    return stock


def ours(model: Any, num_virtual_tokens: int) -> Any:
    """Our model as it comes, but for plain coordinates, so that its gradient is stock's."""
    config = PriorConfig(
        prior="gaussian", num_virtual_tokens=num_virtual_tokens, coordinates="plain", prior_weight=0.0
    )
    return get_prior_model(model, config)


def batch(lengths: list[int], supervised: int, vocabulary: int, device: torch.device, seed: int) -> dict[str, Tensor]:
    """Rows of random tokens of the given lengths, padded on the right, the last ones supervised."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(10, vocabulary, shape, generator=generator)
    position, ends = torch.arange(shape[1]), torch.tensor(lengths)[:, None]
    mask = (position < ends).long()
    labels = ids.masked_fill((position >= ends) | (position < ends - supervised), -100)
    parts = {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}
    return {name: part.to(device) for name, part in parts.items()}


def synchronize(device: torch.device) -> None:
    """Wait for what an accelerator has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def pairs(first: Callable[[int], Any], second: Callable[[int], Any], count: int, device: torch.device) -> list[tuple]:
    """Seconds of both, one after the other in turn, after one call of each to warm up."""
    first(0), second(0)
    timed = []
    for index in range(count):
        order = (first, second) if index % 2 == 0 else (second, first)
        taken = [seconds(partial(call, index), device) for call in order]
        timed.append(tuple(taken if index % 2 == 0 else reversed(taken)))
    return timed


def ratio(timed: list[tuple]) -> dict[str, float]:
    """Median seconds of both, and the median of first over second with its range."""
    ratios = [first / second for first, second in timed]
    return {
        "stock_s": statistics.median(first for first, _ in timed),
        "ours_s": statistics.median(second for _, second in timed),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def matmul_rate(width: int, inner: int, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a `[rows, width] × [width, inner]` product, the best of several."""
    left, right = (
        torch.randn(rows, width, device=device, dtype=dtype),
        torch.randn(inner, width, device=device, dtype=dtype),
    )
    repeats = math.ceil(2e10 / (2 * rows * width * inner))

    def product() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(left, right)

    product()
    return repeats * 2 * rows * width * inner / min(seconds(product, device) for _ in range(5))


def forget_peak() -> int:
    """Start measuring this process's peak memory anew (Linux); bytes in memory now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of this process in memory: now (`VmRSS`), or at most since the peak was last cleared (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    packages = {package: version(package) for package in ("torch", "transformers", "peft", "priors_peft")}
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(), **packages}


def _processor() -> str:
    try:
        lines = open("/proc/cpuinfo").read().splitlines()  # noqa: SIM115
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
