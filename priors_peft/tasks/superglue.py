"""SuperGLUE (Wang et al., 2019): RTE, WSC, BoolQ, WiC, CB and COPA, answered with the text of a class.

Evaluation rows have the texts of all classes as `choices`, so that an answer is scored by likelihood too.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import unknown
from .base import Task, check_template, follow, longest, prompt_completion
from .files import Placed, find_file, hold_out, keep, load_hub, read_rows, split_rows, text_of
from .metrics import exact_match, first_line, macro_f1


HUB_ID = "aps/super_glue"
EVAL_FILES = ["val.jsonl", "validation.jsonl", "dev.jsonl", "dev32.jsonl"]


@dataclass(frozen=True)
class Subtask:
    """One of SuperGLUE's tasks.

    Args:
        folder: Its folder in the published archive.
        fields: What a template may name.
        template: The prompt.
        verbalizer: The answer that stands for each class, in the Hub's order of classes; may name fields.
        description: What it asks for, in English.
    """

    folder: str
    fields: tuple[str, ...]
    template: str
    verbalizer: dict[str, str]
    description: str


YES_NO = {"False": "no", "True": "yes"}
SUBTASKS = {
    "rte": Subtask(
        "RTE",
        ("premise", "hypothesis"),
        "Premise: {premise}\nHypothesis: {hypothesis}\nQuestion: Does the hypothesis follow? Yes or no?\nAnswer:",
        {"entailment": "yes", "not_entailment": "no"},
        "Decide whether the hypothesis follows from the premise: answer yes if the premise makes it true, and no if not.",
    ),
    "wsc": Subtask(
        "WSC",
        ("text", "span1", "span2"),
        "{text}\nQuestion: Does the pronoun _{span2}_ refer to *{span1}*? Yes or no?\nAnswer:",
        YES_NO,
        "Decide whether the marked pronoun stands for the marked noun in the text: answer yes or no.",
    ),
    "boolq": Subtask(
        "BoolQ",
        ("passage", "question"),
        "{passage}\nQuestion: {question}? Yes or no?\nAnswer:",
        YES_NO,
        "Read the passage and answer the question about it with yes or no.",
    ),
    "wic": Subtask(
        "WiC",
        ("word", "sentence1", "sentence2"),
        '{sentence1}\n{sentence2}\nQuestion: Does "{word}" mean the same in both sentences? Yes or no?\nAnswer:',
        YES_NO,
        "Decide whether a word is used with the same meaning in two sentences: answer yes or no.",
    ),
    "cb": Subtask(
        "CB",
        ("premise", "hypothesis"),
        "{premise}\nQuestion: {hypothesis} True, false or neither?\nAnswer:",
        {"entailment": "true", "contradiction": "false", "neutral": "neither"},
        "Decide whether the author of the text holds the sentence to be true, false, or neither.",
    ),
    "copa": Subtask(
        "COPA",
        ("premise", "question", "connective", "choice1", "choice2"),
        "{premise} {connective}",
        {"choice1": "{choice1}", "choice2": "{choice2}"},
        "Choose which of two sentences is the more likely cause or effect of what is described.",
    ),
}


def load(
    subtask: str = "rte",
    template: str | None = None,
    verbalizer: dict[str, str] | None = None,
    num_train: int | None = None,
    num_eval: int | None = None,
    eval_split: str | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    dataset: str = HUB_ID,
) -> Task:
    """Load one of SuperGLUE's tasks.

    Args:
        subtask: `"rte"`, `"wsc"`, `"boolq"`, `"wic"`, `"cb"` or `"copa"`.
        template: The prompt, with the fields of `SUBTASKS[subtask].fields`; its own by default. In WSC's `{text}` the
            noun is marked `*so*` and the pronoun `_so_`. COPA's `{connective}` is `because` or `so`; its premise comes
            without its full stop and its choices in lower case, so that they make one sentence.
        verbalizer: The answer for each class, which may name fields; by default `SUBTASKS[subtask].verbalizer`.
        num_train: Keep this many training rows, drawn by `seed`. `None` keeps all.
        num_eval: Keep this many evaluation rows. `None` keeps all; 0 means none.
        eval_split: Which rows to evaluate on: a file's name without `.jsonl` (`dev32` for FewGLUE's), or the Hub's split.
            By default the validation rows, or the `dev32` of a folder without them.
        seed: Which rows are kept.
        data_dir: The published archive's folder (with `RTE/train.jsonl`, `RTE/val.jsonl`), or a subtask's folder in it.
        dataset: Hub id or folder for `datasets.load_dataset`, where there is no `data_dir`.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If there is no such subtask, a class has no text, a row is unlabelled or lacks a column.
        OSError: If the data set can't be reached.
    """
    if not isinstance(subtask, str) or subtask.lower() not in SUBTASKS:
        raise ValueError(f"subtask must be {unknown(subtask, SUBTASKS)}")
    name, spec = subtask.lower(), SUBTASKS[subtask.lower()]
    template = spec.template if template is None else template
    check_template(template, spec.fields)
    texts = _verbalizer(name, spec, verbalizer)
    train, held_out, source = _read(name, spec, num_eval, eval_split, data_dir, dataset)
    read_train = [(_fields(name, spec, where, row), _label(spec, where, row)) for where, row in train]
    read_eval = [(_fields(name, spec, where, row), _label(spec, where, row)) for where, row in held_out or []]
    draw = random.Random(seed)
    if held_out is None and num_eval != 0:
        read_train, read_eval = hold_out(draw, read_train, num_eval, source, key=lambda row: tuple(row[0].values()))
    read_eval = keep(draw, read_eval, num_eval, "num_eval", source)
    read_train = keep(draw, read_train, num_train, "num_train", source)

    def choices(row: tuple[dict[str, str], str]) -> list[str]:
        prompt = template.format_map(row[0])
        return [follow(prompt, text.format_map(row[0])) for text in texts.values()]

    def pair(row: tuple[dict[str, str], str]) -> tuple[str, str]:
        return template.format_map(row[0]), choices(row)[list(texts).index(row[1])]

    def metrics(predictions: list[str], references: list[str]) -> dict[str, float]:
        said, right = [first_line(text) for text in predictions], [first_line(text) for text in references]
        figures = {"accuracy": exact_match(said, right)}
        return figures | ({"macro_f1": macro_f1(said, right, list(texts.values()))} if len(texts) > 2 else {})

    pairs = [pair(row) for row in read_train]
    return Task(
        name=f"superglue:{name}",
        train=prompt_completion(pairs),
        eval=prompt_completion(map(pair, read_eval), choices=map(choices, read_eval)) if read_eval else None,
        metrics=metrics,
        max_new_tokens=longest([text for _, text in pairs] + [text for row in read_eval for text in choices(row)]),
        description=spec.description,
        template=template,
        dataset=None if data_dir else dataset,
    )


def _verbalizer(name: str, spec: Subtask, given: dict[str, str] | None) -> dict[str, str]:
    """The text of each class, in the order of the classes."""
    if given is None:
        return spec.verbalizer
    if not isinstance(given, dict):
        raise ValueError(f"verbalizer must map classes to texts, got {given!r}")
    # In YAML `true:` is a boolean.
    texts = {
        next((known for known in spec.verbalizer if known.lower() == str(key).lower()), key): text
        for key, text in given.items()
    }
    for key in texts:
        if key not in spec.verbalizer:
            raise ValueError(f"a class in the verbalizer of {name} must be {unknown(key, spec.verbalizer)}")
    missing = [key for key in spec.verbalizer if key not in texts]
    if missing:
        raise ValueError(
            f"verbalizer must have a text for each class of {name}, got none for {' and '.join(map(repr, missing))}. "
            f"Pass all of {', '.join(spec.verbalizer)}"
        )
    for key, text in texts.items():
        check_template(text, spec.fields, f"verbalizer[{key!r}]")
        if not text.strip():
            raise ValueError(f"verbalizer[{key!r}] must not be empty, got {text!r}. Say what is answered")
    stripped = [text.strip() for text in texts.values()]
    if len(set(stripped)) < len(stripped):
        raise ValueError(f"verbalizer must tell the classes of {name} apart, got {texts}")
    return {key: texts[key].strip() for key in spec.verbalizer}


# Reading.


def _read(
    name: str, spec: Subtask, num_eval: int | None, eval_split: str | None, data_dir: str | None, dataset: str
) -> tuple[list[Placed], list[Placed] | None, str]:
    if data_dir is None:
        splits = load_hub(dataset, name, instead="pass a folder with SuperGLUE's jsonl files as data_dir")
        train = _named(split_rows(dataset, splits, "train"), splits["train"])
        split = eval_split or "validation"
        if num_eval == 0 or (eval_split is None and split not in splits):
            return train, None, dataset
        return train, _named(split_rows(dataset, splits, split), splits[split]), dataset
    root = Path(data_dir).expanduser()
    folder = next((path for path in (root / spec.folder, root / name) if path.is_dir()), root)
    expected = (
        f"Expected {spec.folder}/train.jsonl and {spec.folder}/val.jsonl as in SuperGLUE's archive; without data_dir, "
        f"{HUB_ID} is loaded"
    )
    rows = read_rows(find_file(str(folder), ["train.jsonl"], expected))
    if num_eval == 0 or not folder.is_dir():
        return rows, None, str(folder)
    try:
        path = find_file(str(folder), EVAL_FILES if eval_split is None else [f"{eval_split}.jsonl"], expected)
    except FileNotFoundError:
        if eval_split is not None:
            raise
        return rows, None, str(folder)
    return rows, read_rows(path), str(folder)


def _named(rows: list[Placed], split: Any) -> list[Placed]:
    """Rows whose labels are the Hub's numbers, with the names that the split itself gives them."""
    names = getattr(split.features.get("label"), "names", None)
    if names is None:
        return rows
    return [(where, row | {"label": names[row["label"]] if row["label"] >= 0 else None}) for where, row in rows]


def _label(spec: Subtask, where: str, row: dict[str, Any]) -> str:
    classes, label = list(spec.verbalizer), row.get("label")
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return classes[label]
    known = next((name for name in classes if name.lower() == str(label).lower()), None)
    if known is not None:
        return known
    if label is None or label == -1:
        raise ValueError(
            f"{where}: a row must be labelled, got no label: SuperGLUE's test rows have none. "
            "Use the validation rows (val.jsonl, split 'validation')"
        )
    raise ValueError(f"{where}: label must be one of {', '.join(classes)} or their number, got {label!r}")


def _fields(name: str, spec: Subtask, where: str, row: dict[str, Any]) -> dict[str, str]:
    """What a template may name, from a published row or the Hub's."""
    expected = f"Expected the columns of {spec.folder} in SuperGLUE"
    if name == "wsc":
        return _mark(where, row, expected)
    columns = [field for field in spec.fields if field != "connective"]
    fields = {column: text_of(where, row, column, expected).strip() for column in columns}
    if name == "copa":
        if fields["question"] not in ("cause", "effect"):
            raise ValueError(f"{where}: 'question' must be cause or effect, got {fields['question']!r}")
        fields["connective"] = "because" if fields["question"] == "cause" else "so"
        fields["premise"] = fields["premise"].removesuffix(".")
        fields |= {choice: _lower(fields[choice]) for choice in ("choice1", "choice2")}
    return fields


def _lower(sentence: str) -> str:
    return sentence if re.match(r"I\b", sentence) else sentence[:1].lower() + sentence[1:]


def _mark(where: str, row: dict[str, Any], expected: str) -> dict[str, str]:
    """WSC's text with its noun marked `*so*` and its pronoun `_so_`."""
    text, target = text_of(where, row, "text", expected), row.get("target", row)
    marks: list[tuple[int, str]] = []
    spans = {}
    for span, mark in (("span1", "*"), ("span2", "_")):
        words = text_of(where, target, f"{span}_text", expected).split()
        index = target.get(f"{span}_index")
        if not words or not isinstance(index, int):
            raise ValueError(f"{where}: {span} must have a text and an index, got {words} and {index!r}. {expected}")
        # The index counts words, but is off by some in a few published rows: the occurrence next to it is meant.
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
        found = list(re.finditer(pattern, text)) or list(re.finditer(pattern, text, re.IGNORECASE))
        if not found:
            raise ValueError(f"{where}: {span}_text must stand in the text, got {' '.join(words)!r} and {text!r}")
        match = min(found, key=lambda match: abs(text[: match.start()].count(" ") - index))  # noqa: B023
        marks += [(match.start(), mark), (match.end(), mark)]
        spans[span] = " ".join(words)
    for position, mark in sorted(marks, reverse=True):
        text = text[:position] + mark + text[position:]
    return {"text": text, **spans}
