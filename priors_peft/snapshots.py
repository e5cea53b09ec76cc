"""Snapshots of a prompt in training: few, evenly spaced, in one file beside the adapter."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import atomic_path


SNAPSHOTS = "snapshots.safetensors"

# What is kept of one prompt: 1.5 MB for 20 virtual tokens of width 576. In float32: where a prior is narrow, half
# precision moves a prompt by tenths of its standard deviations, and the last snapshot would not be the adapter's prompt.
MOST = 32
MOST_BYTES = 2**26
LEAST = 5


class Snapshots:
    """Snapshots of one prompt at steps that are a multiple of a power of two, which grows with training.

    Which steps are kept depends on the present step alone: it is the same for every process and for a resumed run.

    Args:
        prompt: The prompt, shape `[S, P, d]`; its size decides how many are kept, at most 32 or 64 MiB of them.

    Attributes:
        prompts: θ in float32 by step.
    """

    def __init__(self, prompt: Tensor) -> None:
        self.shape = prompt.shape
        # One more than lie on the grid: the latest.
        self._most = max(LEAST, min(MOST, MOST_BYTES // (4 * prompt.numel()))) - 1
        self.prompts: dict[int, Tensor] = {}

    def is_due(self, step: int) -> bool:
        """Whether the prompt after `step` steps is one that is kept."""
        return step % self._stride(step) == 0

    def take(self, step: int, prompt: Tensor) -> None:
        """Keep a prompt `[S, P, d]`, and of the others those that are still due."""
        stride = self._stride(max([step, *self.prompts]))
        kept = {other: one for other, one in self.prompts.items() if other % stride == 0}
        self.prompts = kept | {step: prompt.detach().float().cpu().clone()}

    def _stride(self, step: int) -> int:
        # The least power of two that leaves at most `_most` multiples between 0 and `step`.
        return 1 << (step // self._most).bit_length()

    def save(self, path: str | os.PathLike) -> None:
        """Write all to a file, atomically: `steps` `[T]`, ascending, and `prompts` `[T, S, P, d]`."""
        steps = sorted(self.prompts)
        tensors = {"steps": torch.tensor(steps), "prompts": torch.stack([self.prompts[step] for step in steps])}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def load(self, path: str | os.PathLike, until: int) -> None:
        """Go on with what a file holds up to a step, if it is of such a prompt."""
        steps, prompts = read_snapshots(path)
        if prompts.shape[1:] == self.shape:
            self.prompts = {step: one for step, one in zip(steps, prompts, strict=True) if step <= until}


def read_snapshots(path: str | os.PathLike) -> tuple[list[int], Tensor]:
    """Steps, ascending, and the prompt after each, shape `[T, S, P, d]`.

    Raises:
        ValueError: The file is damaged.
    """
    try:
        tensors = load_file(Path(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got: {error}. Delete it to go on without the course of training"
        ) from error
    steps, prompts = tensors.get("steps"), tensors.get("prompts")
    if steps is None or prompts is None or prompts.ndim != 4 or steps.shape != prompts.shape[:1] or not len(steps):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise ValueError(f"{path} must hold steps [T] and prompts [T, S, P, d], got {shapes}. Delete it")
    return steps.tolist(), prompts
