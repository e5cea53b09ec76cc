"""Flags and recipe files: both set the fields of the same dataclasses, and a flag wins over the file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..names import check_choice, did_you_mean
from ..tasks.base import full_name


@dataclass
class ModelArguments:
    """Which base model, loaded how."""

    model: str | None = field(
        default=None, metadata={"help": "Base model: a Hub id, a folder, or bundled:smollm2-135m"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model"})
    dtype: str | None = field(default=None, metadata={"help": "float32, bfloat16 or float16; float32 on a CPU"})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model"})


@dataclass
class TaskArguments:
    """Which data."""

    task: str | None = field(
        default=None, metadata={"help": "A task by name, superglue:rte say; completions, if a file is given"}
    )
    task_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the task as JSON: {"module": "algebra__linear_1d"}'}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the data set's own published files"})
    train_file: str | None = field(default=None, metadata={"help": "JSON lines or CSV with prompt and completion"})
    eval_file: str | None = field(default=None, metadata={"help": "The same for evaluation; else rows are held out"})
    dataset: str | None = field(default=None, metadata={"help": "A data set on the Hub"})
    prompt_column: str = field(default="prompt", metadata={"help": "Column with what comes before the answer"})
    completion_column: str = field(default="completion", metadata={"help": "Column with the answer"})
    num_train: int | None = field(default=None, metadata={"help": "Most training rows"})
    num_eval: int | None = field(default=None, metadata={"help": "Most evaluation rows"})
    split_seed: int = field(default=0, metadata={"help": "Seed of the split; the same for every run that is compared"})

    def __post_init__(self) -> None:
        if self.task is not None:
            self.task = full_name(self.task)
        self.task_kwargs = parse_object("task_kwargs", self.task_kwargs)


@dataclass
class PromptArguments:
    """What is tuned, under which prior: the fields of `PriorConfig`."""

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of virtual tokens"})
    tuning: str = field(default="soft", metadata={"help": "soft or deep"})
    prior: str = field(default="structured", metadata={"help": "Family of the prior"})
    prior_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Settings of the prior\'s fit as JSON: {"loc": 0, "scale": 0.02}'}
    )
    reference: str = field(default="vocabulary", metadata={"help": "vocabulary, activations or adapters"})
    reference_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Its settings as JSON: {"tasks": ["math"]}, {"tasks": {"squad": {"data_dir": ...}}}, {"adapters": [...]}'
        },
    )
    layers: list[int] | str | None = field(
        default=None, metadata={"help": "For deep tuning: all, or numbers: 0,-3,-2,-1"}
    )
    deep_init: str | None = field(
        default=None, metadata={"help": "Start of a deep prompt: states or draws; else what suits the prior"}
    )
    coordinates: str = field(default="whitened", metadata={"help": "whitened or plain"})
    prior_weight: str | None = field(
        default=None,
        metadata={"help": "1 Bayes' rule, 0 prior for initialization only; or auto; else what suits inference"},
    )
    inference: str | None = field(
        default=None, metadata={"help": "map, variational, laplace, sghmc or svgd; else what suits the prior"}
    )
    inference_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Its settings as JSON: {"num_samples": 16}'}
    )

    def __post_init__(self) -> None:
        from ..priors import prior_names

        # Before a model and data are loaded for nothing.
        check_choice("prior", self.prior, prior_names())
        check_choice("tuning", self.tuning, ("soft", "deep"))
        if self.deep_init is not None:
            check_choice("deep_init", self.deep_init, ("states", "draws"))
        self.prior_kwargs = parse_object("prior_kwargs", self.prior_kwargs)
        self.reference_kwargs = parse_object("reference_kwargs", self.reference_kwargs)
        self.inference_kwargs = parse_object("inference_kwargs", self.inference_kwargs)
        if self.prior_weight not in (None, "auto"):
            try:
                self.prior_weight = float(self.prior_weight)  # type: ignore[assignment]
            except ValueError:
                raise ValueError(f"prior_weight must be a number >= 0 or auto, got {self.prior_weight!r}") from None
        if isinstance(self.layers, str) and self.layers != "all":
            try:
                self.layers = [int(layer) for layer in self.layers.split(",")]
            except ValueError:
                raise ValueError(f"layers must be all or numbers like 0,-3,-2,-1, got {self.layers!r}") from None


def parse_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A JSON object from a flag, or the mapping a recipe gave."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value or {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object, got {value!r} ({error})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return parsed


def parse(
    dataclasses: Sequence[type],
    arguments: list[str],
    prog: str,
    positional: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
) -> list[Any]:
    """Read positional arguments, at most one recipe file and flags.

    Args:
        dataclasses: Whose fields the flags and the recipe's keys are.
        arguments: The command line.
        prog: The command's name, for its help.
        positional: Names of the arguments that have no flag, before the flags or after them; a last one that ends in `...`
            is one or more.
        defaults: Values of flags, over which a recipe's win.

    Returns:
        One value for each positional argument (a list for `...`), then one object for each dataclass.

    Raises:
        ValueError: A flag is unknown or has no value of its type, in the recipe too, where the line is named; or the recipe
            is no mapping.
    """
    names = ", ".join(name.upper() for name in positional)
    usage = " ".join(filter(None, [prog, names.replace(",", ""), "[RECIPE.yaml] [--FLAG VALUE ...]"]))
    parser = Parser(dataclasses, prog=prog, usage=usage, allow_abbrev=False)
    words = []
    while arguments and not arguments[0].startswith("-"):
        words.append(arguments[0])
        arguments = arguments[1:]
    recipes = [word for word in words if word.endswith((".yaml", ".yml"))]
    values = [word for word in words if word not in recipes]
    if len(recipes) > 1:
        raise ValueError(f"at most one recipe must be given, got {recipes}")
    known = flag_types(dataclasses)
    parser.set_defaults(**defaults or {})
    if recipes:
        parser.set_defaults(**read_recipe(recipes[0], parser, known))
    *objects, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    while rest and len(values) < len(positional) and not rest[0].startswith("-"):
        values.append(rest.pop(0))
    if rest and rest[0].endswith((".yaml", ".yml")):
        raise ValueError(f"a recipe must stand before the flags, got {rest[0]!r} after them")
    if rest:
        raise ValueError(f"{rest[0]!r} is no flag{did_you_mean(rest[0].lstrip('-').replace('-', '_'), known, 1)}")
    many = bool(positional) and positional[-1].endswith("...")
    if len(values) != len(positional) and not (many and len(values) > len(positional)):
        raise ValueError(f"{names or 'no positional argument'} must be given, got {values}")
    if many:
        return [*values[: len(positional) - 1], values[len(positional) - 1 :], *objects]
    return [*values, *objects]


def flag_types(dataclasses: Sequence[type]) -> dict[str, Any]:
    """The type of each flag."""
    return {
        item.name: get_type_hints(dataclass)[item.name]
        for dataclass in dataclasses
        for item in fields(dataclass)
        if item.init
    }


class Parser(HfArgumentParser):
    """Says what is wrong with a flag in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_recipe(path: str, parser: Parser, hints: dict[str, Any]) -> dict[str, Any]:
    """The keys and values of a recipe file; `hints` are the types of the known keys.

    A plain value means what it means after the key's flag on the command line: `save_strategy: no` is no boolean, and
    `learning_rate: 1e-2` no text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the recipe must be a YAML file, got {path!r}, which does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            loader = yaml.SafeLoader(file)
            node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be YAML, got: {' '.join(str(error).split())}") from error
    if node is None or not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        raise ValueError(f"{path} must map flags to values, as in `task: squad`, got {got}")
    _check_twice(path, node)
    return flag_values(path, node, values, parser, hints)


def flag_values(
    path: str, node: yaml.Node, values: dict[str, Any], parser: Parser, hints: dict[str, Any]
) -> dict[str, Any]:
    """A mapping's values as its keys' flags take them; an error names the line."""
    for key, value in node.value:
        name, where = key.value, f"{path}, line {key.start_mark.line + 1}"
        if name not in hints:
            raise ValueError(f"{where}: {name!r} is no flag{did_you_mean(name, hints, 1)}")
        # What flags can't say: nothing, lists and mappings, where the type allows them.
        kinds = {yaml.SequenceNode: "list", yaml.MappingNode: "dict"}
        kind = "None" if values[name] is None else kinds.get(type(value))
        if kind is None:
            try:
                values[name] = vars(parser.parse_args([f"--{name}={value.value}"]))[name]
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        elif kind not in str(hints[name]):
            raise ValueError(f"{where}: {name} must be a single value, got {values[name]!r}")
    return values


def _check_twice(path: str, node: yaml.Node) -> None:
    """Refuse a key that a mapping has twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_twice(path, item)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"{path}, line {line}: {key.value!r} must be given once, got it in line {lines[key.value]} too"
                )
            lines[key.value] = line
            _check_twice(path, value)
