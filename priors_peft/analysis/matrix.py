"""The transfer matrix: every prompt on every task, measured once and kept, and what `transfer` says of it."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..choices import score_choices, scored_metrics
from ..evaluation import answer
from ..files import write_json
from ..model import PriorPeftModel
from ..names import check_choice
from ..tasks import Task
from .measure import neuron_activations
from .transfer import activation_overlap, prompt_similarities, transfer_correlation, transfer_summary


NO_PROMPT = "no prompt"
FORMAT_VERSION = 1


def task_figures(
    model: Any, tokenizer: Any, task: Task, batch_size: int = 16, max_length: int | None = None
) -> dict[str, float]:
    """A task's figures under a model.

    Where evaluation rows have `choices`, all is read off their likelihoods and nothing is generated: the task's
    metrics of the likeliest (`accuracy_by_likelihood`); `nll`, of the right choice without its end token, which is the
    same for all rows and easily learnt, in nats per row; and `choice_nll`, of the right choice among the choices, in
    nats per row: log 2 is a coin's. Elsewhere they are the metrics of generated answers and `nll` in nats per answer
    token.

    Args:
        model: A base model, or one with a prompt.
        tokenizer: Its tokenizer.
        task: With evaluation rows.
        batch_size: Sequences at once.
        max_length: As in `score_choices`, for rows with choices.
    """
    rows = list(task.eval or [])
    if not rows:
        raise ValueError(f"task must have evaluation rows, got {task.name!r} without any")
    if "choices" not in rows[0]:
        answers = answer(model, tokenizer, task.eval, task.max_new_tokens, batch_size, task.name)
        return task.metrics(answers.predictions, answers.references) | {"nll": answers.nll}
    scores = score_choices(model, tokenizer, rows, batch_size, max_length)
    right = [row["choices"].index(row["completion"]) for row in rows]
    logs = [torch.tensor(of_row, dtype=torch.float64) for of_row in scores]
    sums = [-float(of_row[index]) for of_row, index in zip(logs, right, strict=True)]
    among = [-float(of_row.log_softmax(-1)[index]) for of_row, index in zip(logs, right, strict=True)]
    own = {"nll": math.fsum(sums) / len(rows), "choice_nll": math.fsum(among) / len(rows)}
    return scored_metrics(task.metrics, rows, scores) | own


class KeptFigures:
    """Figures in a JSON file that grows by one measurement at a time and is never half written.

    Args:
        path: The file; made with the first figures.

    Raises:
        ValueError: It is no file of figures.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._cells: dict[str, Any] = {}
        if self.path.exists():
            try:
                read = json.loads(self.path.read_text(encoding="utf-8"))
                whole = read["format_version"] == FORMAT_VERSION and isinstance(read["cells"], dict)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise ValueError(
                    f"{self.path} must hold figures that this version wrote, got something else: delete it to measure "
                    "again"
                )
            self._cells = read["cells"]

    def get(self, identity: Mapping[str, Any]) -> dict[str, float] | None:
        """What was measured of this, if it was."""
        found = self._cells.get(_digest(identity))
        return None if found is None else dict(found["figures"])

    def put(self, identity: Mapping[str, Any], figures: dict[str, float]) -> None:
        """Keep what was measured, and write it."""
        self._cells[_digest(identity)] = {"of": dict(identity), "figures": figures}
        write_json(self.path, {"format_version": FORMAT_VERSION, "cells": self._cells})


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _tensor_digest(*tensors: Tensor) -> str:
    return hashlib.sha256(
        b"".join(t.detach().float().cpu().contiguous().numpy().tobytes() for t in tensors)
    ).hexdigest()


def measure_matrix(
    model: PriorPeftModel,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    kept: KeptFigures,
    batch_size: int = 16,
    max_length: int | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Figures of every prompt of a model, and of none, on every task.

    What is in `kept` is not measured again: it counts as the same if the base model, the prompt's numbers, the rows
    and `max_length` are. A run that was stopped goes on.

    Args:
        model: With all prompts as adapters.
        tokenizer: The base model's.
        tasks: By name, with evaluation rows.
        kept: Where figures are kept.
        batch_size: Sequences at once.
        max_length: As in `task_figures`.

    Returns:
        For each adapter, and for `"no prompt"`, the figures on each task, in the tasks' order.
    """
    base = model.base_model
    weight = base.get_input_embeddings().weight
    # Whatever it is called here; all of the weights would take minutes.
    of_model = {
        "kind": type(base).__name__,
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "dtype": str(base.dtype),
        "first_embeddings": _tensor_digest(weight[:256]),
    }
    of_task = {
        name: {
            "task": name,
            "rows": _digest([dict(row) for row in task.eval or []]),
            "max_length": max_length,
            "max_new_tokens": task.max_new_tokens,
        }
        for name, task in tasks.items()
    }
    of_prompt: dict[str, Any] = {NO_PROMPT: None}
    for name in model.peft_config:
        prompt = model.prompt(name)
        of_prompt[name] = {"layers": prompt.layers, "prompt": _tensor_digest(prompt.theta)}
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in of_prompt}
    active = model.active_adapter
    try:
        with tqdm(desc="Prompts on tasks", total=len(of_prompt) * len(tasks), leave=False) as progress:
            for name, identity in of_prompt.items():
                if identity is not None:
                    model.set_adapter(name, inference_mode=True)
                for task_name, task in tasks.items():
                    cell = {"base": of_model, "prompt": identity, "task": of_task[task_name]}
                    found = kept.get(cell)
                    if found is None:
                        measured = base if identity is None else model
                        found = task_figures(measured, tokenizer, task, batch_size, max_length)
                        kept.put(cell, found)
                    figures[name].append(found)
                    progress.update()
    finally:
        model.set_adapter(active, inference_mode=True)
    return figures


def model_similarities(model: PriorPeftModel) -> tuple[dict[str, Tensor], list[str]]:
    """Similarities `[N, N]` between a model's prompts, and notes on those that there are not.

    Of deep prompts the distances add up over layers as squares do, and the cosine is the mean over layers; virtual
    tokens are matched within their layer.
    """
    names, notes = list(model.peft_config), []
    if len(names) < 2:
        return {}, ["A similarity is between two prompts, and there is one: the correlation with transfer needs more."]
    with torch.no_grad():
        prompts = [model.prompt(name) for name in names]
    if len({(prompt.theta.shape, tuple(prompt.layers)) for prompt in prompts}) > 1:
        return {}, ["The prompts have different numbers of virtual tokens or layers: no similarity compares them."]
    stacked = torch.stack([prompt.theta for prompt in prompts])
    layers = [prompt_similarities(stacked[:, layer]) for layer in range(stacked.shape[1])]
    frobenius, cosine, matched = (
        torch.stack([layer[name] for layer in layers]) for name in ("frobenius", "cosine", "matched")
    )
    similarities = {"frobenius": -frobenius.norm(dim=0), "cosine": cosine.mean(0), "matched": -matched.norm(dim=0)}
    try:
        similarities["neurons"] = activation_overlap(neuron_activations(model, stacked))
    except ValueError as error:
        notes.append(f"No overlap of neurons: {error}.")
    return similarities, notes


def transfer_part(
    figures: Mapping[str, Sequence[Mapping[str, float]]],
    tasks: Sequence[str],
    own: Sequence[str | None] | None,
    similarities: Mapping[str, Tensor],
    notes: Sequence[str] = (),
    metric: str | None = None,
    num_permutations: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """The `"transfer"` part of an `analysis.json`; its schema is in docs/analysis.md.

    Args:
        figures: From `measure_matrix`.
        tasks: Names of its columns.
        own: The task each prompt was trained on, among `tasks` or another; None where that is not known, which leaves
            the shares and correlations out.
        similarities: From `model_similarities`, in the figures' order.
        notes: What could not be compared.
        metric: The figure in the matrix; by default the first that all tasks have, their own metrics first.
        num_permutations: Of each correlation's p-value.
        seed: Of those and of the bootstrap.

    Raises:
        ValueError: Not every task has the metric.
    """
    prompts = [name for name in figures if name != NO_PROMPT]
    shared = [key for key in figures[NO_PROMPT][0] if all(key in cell for row in figures.values() for cell in row)]
    metric = metric or shared[0]
    check_choice("metric", metric, shared)
    notes, columns = list(notes), _columns(own, tasks)
    if columns is None:
        unknown = [name for name, task in zip(prompts, own or [None] * len(prompts), strict=True) if task is None]
        notes.append(
            f"Which task {', '.join(unknown)} was trained on is not known: no share of transfers. Pass it as own."
        )
    parts = {key: _of_metric(key, figures, prompts, columns, similarities, num_permutations, seed) for key in shared}
    for reason in {part.pop("missing") for part in parts.values()} - {None}:
        notes.append(f"No correlation with transfer: {reason}.")
    return {
        "tasks": list(tasks),
        "prompts": prompts,
        "own_tasks": list(own) if own is not None else [None] * len(prompts),
        "own": columns,
        "metric": metric,
        **parts[metric],
        "similarities": {name: values.tolist() for name, values in similarities.items()},
        "by_metric": parts,
        "notes": notes,
    }


def _columns(own: Sequence[str | None] | None, tasks: Sequence[str]) -> list[int | None] | None:
    if own is None or any(task is None for task in own):
        return None
    return [tasks.index(task) if task in tasks else None for task in own]  # type: ignore[arg-type]


def _of_metric(
    metric: str,
    figures: Mapping[str, Sequence[Mapping[str, float]]],
    prompts: list[str],
    own: list[int | None] | None,
    similarities: Mapping[str, Tensor],
    num_permutations: int,
    seed: int,
) -> dict[str, Any]:
    """The matrix of one figure, and what it says; `missing` is why there is no correlation."""
    scores = torch.tensor([[cell[metric] for cell in figures[name]] for name in prompts], dtype=torch.float64)
    none = torch.tensor([cell[metric] for cell in figures[NO_PROMPT]], dtype=torch.float64)
    higher = not metric.endswith("nll")
    part: dict[str, Any] = {
        "higher_is_better": higher,
        "scores": scores.tolist(),
        "no_prompt": none.tolist(),
        "share_beating_no_prompt": None,
        "correlations": None,
        "missing": None,
    }
    if own is None:
        return part
    try:
        summary = transfer_summary(scores, none, own, higher)
    except ValueError as error:
        return part | {"missing": str(error)}
    part |= {"share_beating_no_prompt": summary.share} | summary.to_dict()
    try:
        found = {
            name: transfer_correlation(values, summary.gain_over_none, own, num_permutations, seed=seed).to_dict()
            for name, values in similarities.items()
        }
    except ValueError as error:
        return part | {"missing": str(error)}
    # Seeds of a task are relabelled together, so the tasks' permutations are all that can differ much.
    smallest = 1 / math.factorial(len(set(own)))
    return part | {"correlations": {name: one | {"smallest_p": smallest} for name, one in found.items()} or None}
