"""Tasks: data in prompt-completion form with its metrics. A new task is one file here with a `load` function."""

from .base import Task, load_task


__all__ = ["Task", "load_task"]
