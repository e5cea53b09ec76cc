"""DeepMind MATH (Saxton et al., 2019): school questions of 56 kinds, generated here or read from the published files.

Generated questions are frozen: the first call writes them to the cache folder, later calls read them back, so that a
seed names the same rows for ever (13 composed modules draw differently from run to run whatever is seeded).
"""

import functools
import hashlib
import importlib
import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..files import atomic_path, cache_dir
from ..names import check_choice, unknown
from .base import Task, check_template, fill, prompt_completion
from .metrics import completion_metrics


LEVELS = ("train-easy", "train-medium", "train-hard")
EVAL_SPLITS = ("interpolate", "extrapolate")
TEMPLATE = "Question: {question}\nAnswer:"
DESCRIPTION = "Solve the school mathematics question and write only the final answer."
GROUPS = ". A group is the part before __, as arithmetic"
MAX_NEW_TOKENS = 32  # answers have at most 30 characters

Pair = tuple[str, str]


def load(
    module: str = "arithmetic__add_or_sub",
    template: str = TEMPLATE,
    eval_split: str = "interpolate",
    num_train: int = 4000,
    num_eval: int = 128,
    seed: int = 0,
    data_dir: str | None = None,
) -> Task:
    """Load one module or a group of them: `Question: {question}\\nAnswer:` completed by ` {answer}`.

    Training questions are an equal mixture of the levels easy, medium and hard, and of a group's modules. No evaluation
    question is ever a training question. When generating, the hash of a question decides which side it may be on, so this
    holds between any two seeds and sizes too.

    Args:
        module: A module's name, for example `"calculus__differentiate"`, or a group's, the part before `__`.
        template: The prompt, with the field `{question}`.
        eval_split: `"interpolate"`: questions like those of training; `"extrapolate"`: larger numbers or more terms, which
            15 of the 56 modules have.
        num_train: Number of training questions.
        num_eval: Number of evaluation questions; 0 for none.
        seed: Which questions are drawn.
        data_dir: Folder of the published data set (`train-easy/`, `train-medium/`, `train-hard/`, `interpolate/`,
            `extrapolate/` with a text file a module, question and answer lines in turn). `None` generates the questions.

    Raises:
        ValueError: If there is no such module, group or split, or the published files have fewer questions than asked for.
        FileNotFoundError: If a published file is not there.
        ImportError: If the questions must be generated and `mathematics-dataset` is not installed.
    """
    check_template(template, ("question",))
    check_choice("eval_split", eval_split, EVAL_SPLITS)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    names = [module] if "__" in str(module) else _group(module, _known(folder, "interpolate"))
    tests = {name: name for name in names}
    if eval_split == "extrapolate" and num_eval:
        tests = _extrapolations(names, _known(folder, "interpolate"), _known(folder, "extrapolate"))
    tested = _shares(list(tests), num_eval)
    train: list[Pair] = []
    held_out: list[Pair] = []
    for name, count in _shares(names, num_train).items():
        test = (eval_split, tests[name], tested[name]) if tested.get(name) else None
        if folder is not None:
            rows, questions = _read_published(folder, name, count, test, seed)
        else:
            rows = _frozen(name, "train", count, seed)
            questions = _frozen(test[1], test[0], test[2], seed) if test else []
        train, held_out = train + rows, held_out + questions
    if len(names) > 1:
        asked = {question for question, _ in held_out}
        train = [row for row in train if row[0] not in asked]  # published modules of a group may share questions
        random.Random(seed).shuffle(train)

    def pairs(rows: list[Pair]) -> list[Pair]:
        return fill(template, (({"question": question}, answer) for question, answer in rows))

    return Task(
        name="math",
        train=prompt_completion(pairs(train)),
        eval=prompt_completion(pairs(held_out)) if held_out else None,
        metrics=completion_metrics,
        max_new_tokens=MAX_NEW_TOKENS,
        description=DESCRIPTION,
        template=template,
    )


def module_names() -> list[str]:
    """The 56 modules, for example `arithmetic__add_or_sub`; needs the generator installed."""
    return sorted(_modules()["interpolate"])


def _known(folder: Path | None, level: str) -> list[str]:
    """The modules of a level: the published files', or the generator's."""
    return (
        sorted(_modules()[level]) if folder is None else sorted(file.stem for file in (folder / level).glob("*.txt"))
    )


def _group(name: str, known: list[str]) -> list[str]:
    """The modules of a group; a name that is no group's stands for itself, to be refused where it is read."""
    return [module for module in known if module.startswith(f"{name}__")] or [name]


def _extrapolations(names: list[str], known: list[str], harder: list[str]) -> dict[str, str]:
    """The harder module of each name that has one: `arithmetic__mul_big` is `arithmetic__mul`'s."""
    found = {}
    for test in harder:
        # The longest, as `arithmetic__mul_div_multiple_longer` begins with `arithmetic__mul` too.
        found[max((name for name in known if test.startswith(name)), key=len, default=test)] = test
    tests = {name: found[name] for name in names if name in found}
    if not tests:
        raise ValueError(
            f"eval_split 'extrapolate' has questions for {', '.join(sorted(found)) or 'no module'}, got module "
            f"{' and '.join(names)}. Pass eval_split='interpolate'"
        )
    return tests


def _shares(names: list[str], count: int) -> dict[str, int]:
    """`count` divided as equally as it goes."""
    return {name: count // len(names) + (index < count % len(names)) for index, name in enumerate(names)}


# Generated questions.


def _frozen(module: str, split: str, count: int, seed: int) -> list[Pair]:
    """The questions of this key from the cache folder, generated first if nobody did yet."""
    from filelock import FileLock

    if not count:
        return []
    try:
        version = importlib.metadata.version("mathematics-dataset")
    except importlib.metadata.PackageNotFoundError as error:
        raise _not_installed("mathematics-dataset") from error
    path = cache_dir() / "math" / f"{module}-{split}-{count}-seed{seed}-v{version}.jsonl"
    if not path.is_file():
        if module not in _modules()[split if split in EVAL_SPLITS else "interpolate"]:
            raise ValueError(f"module must be {unknown(module, module_names())}{GROUPS}")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes of one launch come here together: one generates, the others read what it wrote.
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                rows = _generate(module, split, count, seed)
                with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    with open(path, encoding="utf-8") as file:
        return [(row["question"], row["answer"]) for row in map(json.loads, file)]


def _generate(module: str, split: str, count: int, seed: int) -> list[Pair]:
    """Draw `count` questions; the first of a longer draw are the questions of a shorter one."""
    from tqdm import tqdm

    settings = importlib.import_module("mathematics_dataset.generate_settings")
    levels = LEVELS if split == "train" else (split,)
    samplers = [_modules()[level][module] for level in levels]
    rows: list[Pair] = []
    with _seeded(f"{module}/{split}/{seed}"), tqdm(total=count, desc=f"{module} ({split})", delay=2) as bar:
        while len(rows) < count:
            problem = samplers[len(rows) % len(samplers)]()
            question, answer = str(problem.question), str(problem.answer)
            too_long = len(question) > settings.MAX_QUESTION_LENGTH or len(answer) > settings.MAX_ANSWER_LENGTH
            if not too_long and _is_held_out(question) == (split != "train"):
                rows.append((question, answer))
                bar.update()
    return rows


def _is_held_out(question: str) -> bool:
    """Whether a question is reserved for evaluation, as a quarter of all questions are."""
    return hashlib.sha256(question.encode()).digest()[0] < 64


@contextmanager
def _seeded(key: str) -> Iterator[None]:
    """Seed the two generators the package draws from, and give them back as they were."""
    # The package knows only the global generators.
    states = random.getstate(), np.random.get_state()
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.cache
def _modules() -> dict[str, dict[str, Callable[[], Any]]]:
    """A sampler for each level and module."""
    try:
        _mend_package()
        modules = importlib.import_module("mathematics_dataset.modules.modules")
    except ModuleNotFoundError as error:
        raise _not_installed(str(error.name)) from error
    # The levels are thirds of each module's range of entropy (`generate.py`, which would define global flags).
    tree = {level: modules.train(functools.partial(_third, index)) for index, level in enumerate(LEVELS)}
    tree["interpolate"], tree["extrapolate"] = modules.test(), modules.test_extra()
    return {
        level: {f"{area}__{name}": sampler for area, samplers in areas.items() for name, sampler in samplers.items()}
        for level, areas in tree.items()
    }


def _not_installed(package: str) -> ImportError:
    return ImportError(
        f"task 'math' generates its questions with mathematics-dataset, got no package {package!r}. "
        "Run `pip install priors_peft[demo]`, or pass the folder of the published data set as data_dir"
    )


def _third(index: int, entropy: tuple[float, float]) -> tuple[float, float]:
    low, high = entropy
    return low + (high - low) * index / 3, low + (high - low) * (index + 1) / 3


def _mend_package() -> None:
    """Let mathematics-dataset 1.0.1, written for the numpy and sympy of 2018, run on today's; both stay untouched."""
    linear = importlib.import_module("sympy.solvers.diophantine.diophantine").base_solution_linear

    def base_solution_linear(c: Any, a: Any, b: Any, t: Any) -> tuple[Any, Any]:
        return linear(int(c), int(a), int(b), int(t))

    # The name moved to a submodule; it is back only while the one module that wants it is imported.
    package: Any = importlib.import_module("sympy.solvers.diophantine")
    package.base_solution_linear = base_solution_linear
    try:
        polynomials: Any = importlib.import_module("mathematics_dataset.sample.polynomials")
    finally:
        del package.base_solution_linear
    polynomials.np = _OldNumpy("numpy")


class _OldArray(np.ndarray):
    """An array that still has `itemset`."""

    def itemset(self, index: Any, value: Any) -> None:
        self[index] = value


class _OldNumpy(ModuleType):
    """numpy with the three names that one module of the package misses."""

    object = object

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> np.ndarray:
        return np.zeros(*args, **kwargs).view(_OldArray)

    @staticmethod
    def empty(*args: Any, **kwargs: Any) -> np.ndarray:
        return np.empty(*args, **kwargs).view(_OldArray)


# The published files.


def _read_published(
    folder: Path, module: str, num_train: int, test: tuple[str, str, int] | None, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """`num_train` training questions of a module and those of a test `(split, module, number)`, if any."""
    draw = random.Random(seed)
    held_out = _read_pairs(folder, test[0], test[1]) if test else []
    candidates = {question for question, _ in held_out}
    seen: set[str] = set()
    train: list[Pair] = []
    for index, level in enumerate(LEVELS):
        rows = _read_pairs(folder, level, module)
        seen.update(question for question, _ in rows if question in candidates)
        train += _draw(draw, rows, (num_train + 2 - index) // 3, folder / level, "num_train")
    draw.shuffle(train)
    held_out = [row for row in held_out if row[0] not in seen]
    return train, _draw(draw, held_out, test[2], folder / test[0], "num_eval") if test else []


def _draw(draw: random.Random, rows: list[Pair], count: int, folder: Path, argument: str) -> list[Pair]:
    if count > len(rows):
        raise ValueError(
            f"{argument} asks for {count} questions of {str(folder)!r}, which has {len(rows)} "
            f"(training questions aside). Pass a smaller {argument}"
        )
    return draw.sample(rows, count)


def _read_pairs(folder: Path, level: str, module: str) -> list[Pair]:
    path = folder / level / f"{module}.txt"
    if not path.is_file():
        modules = [file.stem for file in (folder / level).glob("*.txt")]
        if modules and module not in modules:
            raise ValueError(
                f"module must be {unknown(module, modules)} (the files in {str(folder / level)!r}){GROUPS}"
            )
        raise FileNotFoundError(
            f"data_dir must hold the published data set, got {str(folder)!r} without {level}/{module}.txt. "
            "Pass the folder that holds train-easy, train-medium, train-hard and interpolate; without data_dir, the "
            "questions are generated"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) % 2:
        raise ValueError(
            f"{str(path)!r} must hold question and answer lines in turn, got an odd number of lines, {len(lines)}"
        )
    return list(zip(lines[::2], lines[1::2], strict=True))
