"""A grid of trainings: `python recipes/sweep.py SWEEP.yaml [--flag value ...]`, or with `accelerate launch`.

A sweep file is a recipe of `priors-peft train` with a `grid`: its axes are lists of a flag's values, or mappings from
labels to the flags they stand for. Each combination is one run in `output_dir/runs`, with one line in
`output_dir/results.jsonl`. What is done is not done again, and a run that was stopped goes on from its last checkpoint.
"""

import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from priors_peft.commands.arguments import (
    ModelArguments,
    Parser,
    PromptArguments,
    TaskArguments,
    flag_types,
    flag_values,
    parse,
    read_recipe,
)
from priors_peft.commands.train import PLACES, TrainingArguments, base_model_from, end_together, recipe_of, train
from priors_peft.files import atomic_path, write_json
from priors_peft.hub.facts import SETTINGS, UNUSUAL, read_facts
from priors_peft.names import unknown


RESULTS, PLANNED = "results.jsonl", "sweep.json"
PROG = "python recipes/sweep.py"
# Of evaluation, besides what training depends on.
EVALUATION = ("prediction_loss_only", "eval_on_start", "posterior_draws")


@dataclass
class SweepArguments:
    """What a sweep file has besides the flags of `priors-peft train`."""

    grid: dict[str, Any] | None = field(default=None, metadata={"help": "Axes: lists of values, or labels with flags"})
    recipe: str | None = field(default=None, metadata={"help": "A recipe or sweep beside the file, which it changes"})


DATACLASSES = (ModelArguments, TaskArguments, PromptArguments, TrainingArguments)
FLAGS = flag_types(DATACLASSES)


@dataclass
class Run:
    """One combination.

    Attributes:
        labels: Its label on each axis.
        settings: Values of flags, from the file.
        flags: Of the command line, which win.
    """

    labels: dict[str, str]
    settings: dict[str, Any]
    flags: list[str]

    @property
    def name(self) -> str:
        return "-".join(self.labels.values())

    def parsed(self) -> list[Any]:
        """The arguments of `train`."""
        return parse(DATACLASSES, self.flags, PROG, defaults=self.settings)


def main(arguments: list[str]) -> None:
    # ---- What is asked for --------------------------------------------------------------
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"a sweep file must be given: {PROG} SWEEP.yaml [--flag value ...]")
    runs = read_sweep(arguments[0], arguments[1:])
    out = Path(runs[0].parsed()[-1].output_dir)
    done = {record["run"]: record for record in read_results(out / RESULTS)}
    plan(out, runs, done)
    is_main = PartialState().is_main_process
    # Sharded training changes a model in place.
    load = functools.cache(_load) if PartialState().num_processes == 1 else lambda *key: None

    # ---- Training -----------------------------------------------------------------------
    places: dict[str, Any] = {}
    left = [run for run in runs if run.name not in done]
    if is_main:
        print(f"{len(runs)} runs in {out / 'runs'}, {len(runs) - len(left)} of them done", flush=True)
    for run in runs:
        task = run.parsed()[1]
        if task.task and task.data_dir:
            places[task.task] = {"data_dir": task.data_dir}
    for number, run in enumerate(left):
        if is_main:
            seconds = [expected(other, list(done.values())) for other in left[number:]]
            remaining = f", about {sum(seconds) / 60:.0f} min left" if None not in seconds else ""
            print(f"\n[{len(runs) - len(left) + number + 1}/{len(runs)}] {run.name}{remaining}", flush=True)
        model, task, prompt, args = run.parsed()
        args.output_dir, args.resume = str(out / "runs" / run.name), True
        flags, start = recipe_of(model, task, prompt, args), time.perf_counter()
        train(model, task, prompt, args, load(model.model, model.model_revision, model.dtype, model.trust_remote_code))
        if is_main:
            facts = read_facts(args.output_dir)
            done[run.name] = {
                "run": run.name,
                "labels": run.labels,
                "flags": flags,
                "results": facts.results.get("default", {}),
                "initial_results": facts.initial_results.get("default", {}),
                "steps": facts.steps,
                "seconds": round(time.perf_counter() - start, 1),
            }
            with atomic_path(out / RESULTS) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in done.values()), encoding="utf-8")
    if is_main:
        flag = f" --tasks '{json.dumps(places)}'" if places else ""
        print(f"\n{len(runs)} runs done: {out / RESULTS}")
        print(f"priors-peft compare {out / 'runs'}/* --out {out / 'compare'}{flag}")
    end_together()


def _load(*given: Any) -> tuple[Any, Any]:
    return base_model_from(ModelArguments(*given))


# The grid.

Axes = dict[str, dict[str, dict[str, Any]]]


def read_sweep(path: str, arguments: list[str]) -> list[Run]:
    """The runs of a sweep file, its last axis the fastest.

    Args:
        path: The file. `recipe` in it names a recipe or a sweep beside it, which it changes: a flag by a flag, the flags of a
            label by a mapping; a list keeps these labels of an axis.
        arguments: `--AXIS LABEL ...` keeps labels too, `--LABEL.FLAG VALUE` sets a label's flag, `--FLAG VALUE` one of all runs.

    Raises:
        ValueError: There is no grid, a key is no flag, or a label is not there; the message says which.
    """
    settings, axes = _read(path)
    if not axes:
        raise ValueError(f"{path} must have a grid: axes with lists of values or mappings from labels to flags")
    flags = _choose(axes, arguments)
    for label in itertools.chain(*axes.values()):
        if not re.fullmatch(r"[\w.,+-]+", label):
            raise ValueError(f"labels must be letters, digits and . , + - _ for a folder's name, got {label!r}")
    runs = []
    for chosen in itertools.product(*(of_axis.items() for of_axis in axes.values())):
        labels = dict(zip(axes, (label for label, _ in chosen), strict=True))
        runs.append(Run(labels, functools.reduce(dict.__or__, (own for _, own in chosen), settings), flags))
        if runs[-1].name in {run.name for run in runs[:-1]}:
            raise ValueError(f"labels must name each run once, got {runs[-1].name!r} twice: rename a label")
    return runs


def _read(path: str) -> tuple[dict[str, Any], Axes]:
    """Flags of all runs, and for each axis the flags of its labels."""
    parser = Parser((SweepArguments, *DATACLASSES))
    own = read_recipe(path, parser, FLAGS | flag_types((SweepArguments,)))
    recipe, grid = own.pop("recipe", None), own.pop("grid", None) or {}
    settings, axes = _read(str(Path(path).parent / recipe)) if recipe else ({}, {})
    nodes = {key.value: node for key, node in yaml.compose(Path(path).read_text(encoding="utf-8")).value}
    # Names are as they are written: YAML takes `no` for a boolean.
    for (axis, node), given in zip(nodes["grid"].value if grid else [], grid.values(), strict=True):
        name = axis.value
        if isinstance(given, list) and given:
            if name not in axes:
                for item, value in zip(node.value, given, strict=True):
                    flag_values(path, yaml.MappingNode("", [(axis, item)]), {name: value}, parser, FLAGS)
            _keep(axes, name, [str(item.value) for item in node.value])
        elif isinstance(given, dict) and all(isinstance(flags or {}, dict) for flags in given.values()):
            for (key, flags), values in zip(node.value, given.values(), strict=True):
                label = key.value
                known = axes.setdefault(name, {})
                named = {name: label} if name in FLAGS else {}
                typed = flag_values(path, flags, values, parser, FLAGS) if values else {}
                known[label] = named | known.get(label, {}) | typed
        else:
            line = node.start_mark.line + 1
            raise ValueError(f"{path}, line {line}: {name} must list values or map labels to flags, got {given!r}")
    return settings | own, axes


def _keep(axes: Axes, axis: str, values: list[str]) -> None:
    """Keep these labels of an axis; one that lists a flag's values takes any others."""
    known = axes.get(axis, {})
    if not all(set(flags) == {axis} for flags in known.values()):
        for value in values:
            if value not in known:
                raise ValueError(f"{axis} must be {unknown(value, known)}")
    axes[axis] = {value: known.get(value, {axis: value}) for value in values}


def _choose(axes: Axes, arguments: list[str]) -> list[str]:
    """Apply what the command line says of axes and labels, in place; returns the flags of all runs."""
    flags: list[str] = []
    for word, *values in _by_flag(arguments):
        name = word.removeprefix("--")
        label, dot, flag = name.rpartition(".")
        owners = [of_axis for of_axis in axes.values() if label in of_axis]
        if name in axes and values:
            _keep(axes, name, values)
        elif dot and owners and flag in FLAGS and len(values) == 1:
            for of_axis in owners:
                of_axis[label] = of_axis[label] | {flag: values[0]}
        elif dot:
            labels = ", ".join(itertools.chain(*axes.values()))
            raise ValueError(f"{word} must be --LABEL.FLAG VALUE with a label among {labels}, got {values}")
        else:
            flags += [word, *values]
    return flags


def _by_flag(arguments: list[str]) -> list[list[str]]:
    """Flags, each with the words that follow it."""
    groups: list[list[str]] = []
    for word in arguments:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif not groups:
            raise ValueError(f"{word!r} is no flag")
        else:
            groups[-1].append(word)
    return groups


# What was done.


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of finished runs."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def plan(out: Path, runs: list[Run], done: Collection[str]) -> None:
    """Keep each run's settings; refuse to go on with, or to count as done, one that was begun with others."""
    path = out / PLANNED
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    planned = {run.name: settings_of(run) for run in runs}
    defaults = settings_of(Run({}, {}, []))
    for name, settings in planned.items():
        # What an older version did not know was as its default is now.
        before = defaults | known[name] if name in known else settings
        other = sorted(key for key in settings.keys() | before.keys() if settings.get(key) != before.get(key))
        if other and (name in done or (out / "runs" / name).exists()):
            raise ValueError(
                f"{other[0]} must be {before.get(other[0])!r} as when the run {name} was begun, got "
                f"{settings.get(other[0])!r}: pass another output_dir, or delete {out / 'runs' / name} and its line in {RESULTS}"
            )
    if PartialState().is_main_process:
        write_json(path, known | planned)


def settings_of(run: Run) -> dict[str, Any]:
    """All that a run's figures depend on, as JSON has it; where data lies in full."""
    *others, args = run.parsed()
    found = {name: value for given in others for name, value in vars(given).items()}
    found |= {name: getattr(args, name) for name in (*SETTINGS, *UNUSUAL, *EVALUATION)}
    return json.loads(json.dumps(_in_full(found), default=str))


def _in_full(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _in_full(value)
        if isinstance(value, dict)
        else str(Path(value).resolve())
        if name in PLACES and value
        else value
        for name, value in settings.items()
    }


def expected(run: Run, done: list[dict[str, Any]]) -> float | None:
    """Seconds that a run will take: the mean of those finished runs that share the most labels with it."""
    shared = [sum(record["labels"].get(axis) == label for axis, label in run.labels.items()) for record in done]
    alike = [record["seconds"] for record, count in zip(done, shared, strict=True) if count == max(shared)]
    return sum(alike) / len(alike) if alike else None


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"sweep.py: {error}")
