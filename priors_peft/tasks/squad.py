"""SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018): questions about a passage whose answer is a span of it.

What does not fit the model's window is cut from the passage and nowhere else. In training the part that is kept holds
the answer and is drawn at random among those that do, so that where an answer stands says nothing; in evaluation it is
the part that shares most words with the question, which needs no answer to be known.
"""

import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import evaluate
from datasets import Features, List, Value

from .base import Task, check_template, fill, prompt_completion
from .files import check_row, find_file, hold_out, keep, load_hub, read_rows, split_rows, text_of
from .metrics import first_line, squad_exact_match, squad_f1, squad_normalize


logger = logging.getLogger(__name__)

TEMPLATE = "{context}\nQuestion: {question}\nAnswer:"
DESCRIPTION = "Read the passage and answer the question about it with the shortest span of its words that answers it."
MAX_NEW_TOKENS = 32  # 15 of 3,756 answers of version 1.1 are longer in SmolLM2's tokens
HUB_IDS = {"1.1": "rajpurkar/squad", "2.0": "rajpurkar/squad_v2"}
EXPECTED = (
    "Expected SQuAD's own JSON (train-v1.1.json, dev-v1.1.json), rows with context, question and answers "
    "{text, answer_start}, or rows with context, question and answer; without data_dir, rajpurkar/squad is loaded"
)


@dataclass(frozen=True)
class Row:
    """A question. `answers` is empty where the passage has none; `start` is where the first stands, if that is known."""

    context: str
    question: str
    answers: tuple[str, ...]
    start: int | None


def load(
    version: str | float = "1.1",
    template: str = TEMPLATE,
    no_answer: str = "unanswerable",
    num_train: int | None = None,
    num_eval: int | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    dataset: str | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
) -> Task:
    """Load questions; the completion is the first answer, and evaluation knows all of them.

    Args:
        version: `"1.1"`, or `"2.0"` with questions that have no answer.
        template: The prompt, with the fields `{context}` and `{question}`.
        no_answer: What is answered where there is no answer.
        num_train: Keep this many training rows, drawn by `seed`. `None` keeps all.
        num_eval: Keep this many evaluation rows. `None` keeps all of a published file or split; 0 means none.
        seed: Which rows are kept and held out, and which part of a long passage is trained on.
        data_dir: A folder with `train-v1.1.json` and `dev-v1.1.json` (or the one file `train*.json` or `.jsonl`, and
            the one `dev*`, `val*` or `test*`), or a training file. Without an evaluation file `num_eval` rows are held
            out, a tenth (at most 512) by default, and no passage is on both sides.
        dataset: Another Hub id or folder for `datasets.load_dataset`; by default the version's own on the Hub.
        tokenizer: The base model's, to count tokens by.
        max_length: Most tokens of a row without virtual tokens; longer passages are cut, never the question. A training
            row whose answer can't be kept is left out and counted in a warning.

    Raises:
        FileNotFoundError: If there is no file to read.
        ValueError: If a file or an argument is not as described; the message names the file and the row.
        OSError: If the data set can't be reached.
    """
    if str(version) not in HUB_IDS:
        raise ValueError(f"version must be {' or '.join(HUB_IDS)}, got {version!r}")
    check_template(template, ("context", "question"))
    if not isinstance(no_answer, str) or not squad_normalize(no_answer):
        raise ValueError(f"no_answer must be text with a word in it, got {no_answer!r}. What is said for no answer?")
    if max_length is not None and tokenizer is None:
        raise ValueError(f"max_length counts tokens, got {max_length} without a tokenizer. Pass tokenizer too")
    version = str(version)
    train, held_out, source = _read(version, num_eval, data_dir, dataset)
    draw = random.Random(seed)
    if held_out is None and num_eval != 0:
        train, held_out = hold_out(draw, train, num_eval, source, key=lambda row: row.context)
    held_out = keep(draw, held_out or [], num_eval, "num_eval", source)
    train = keep(draw, train, num_train, "num_train", source)
    if max_length is not None:
        cut = _Cutter(template, no_answer, tokenizer, max_length, seed)
        train, held_out = cut.around_answers(train), cut.around_questions(held_out)
        if not train:
            raise ValueError(f"max_length must leave room for a question and its answer, got {max_length}. Raise it")

    def pairs(rows: list[Row]) -> list[tuple[str, str]]:
        return fill(template, ((vars(row), _answer(row, no_answer)) for row in rows))

    def metrics(predictions: list[str], references: list[Any]) -> dict[str, float]:
        said = [first_line(text) for text in predictions]
        if version == "2.0":
            said = ["" if squad_normalize(text) == squad_normalize(no_answer) else text for text in said]
        return dict(SquadMetric(keep_in_memory=True).compute(predictions=said, references=references) or {})

    return Task(
        name="squad",
        train=prompt_completion(pairs(train)),
        eval=prompt_completion(pairs(held_out), answers=(list(row.answers) for row in held_out)) if held_out else None,
        metrics=metrics,
        max_new_tokens=MAX_NEW_TOKENS,
        description=DESCRIPTION,
        template=template,
        dataset=None if data_dir else source,
    )


class SquadMetric(evaluate.Metric):
    """Exact match and F1 of SQuAD's official scripts, as shares in [0, 1], without the Hub.

    `compute(predictions, references)`: one text a row, and one text or the list of a row's right answers, of which the
    best counts. As in the script of version 2.0 an empty list means that there is no answer, and so does an empty
    prediction; answers that are nothing but articles and punctuation don't count.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        return evaluate.MetricInfo(
            description="SQuAD's exact match and F1, in [0, 1]",
            citation="Rajpurkar et al. (2016), arXiv:1606.05250; Rajpurkar et al. (2018), arXiv:1806.03822",
            inputs_description="predictions: texts; references: texts, or lists of the texts that are right",
            features=[
                Features({"predictions": text, "references": List(text)}),
                Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions: list[str], references: list[Any]) -> dict[str, float]:  # type: ignore[override]
        golds = [[gold] if isinstance(gold, str) else gold for gold in references]
        golds = [[gold for gold in row if squad_normalize(gold)] or [""] for row in golds]
        return {"exact_match": squad_exact_match(predictions, golds), "f1": squad_f1(predictions, golds)}


def _answer(row: Row, no_answer: str) -> str:
    return row.answers[0] if row.answers else no_answer


# Reading.


def _read(
    version: str, num_eval: int | None, data_dir: str | None, dataset: str | None
) -> tuple[list[Row], list[Row] | None, str]:
    if data_dir is not None and dataset is not None:
        raise ValueError(f"one of data_dir and dataset must be given, got {data_dir!r} and {dataset!r}. Leave one out")
    if data_dir is None:
        source = dataset or HUB_IDS[version]
        splits = load_hub(source, instead="pass a folder with SQuAD's JSON as data_dir")
        train = [_flat(where, row, version) for where, row in split_rows(source, splits, "train")]
        if "validation" not in splits or num_eval == 0:
            return train, None, source
        return train, [_flat(where, row, version) for where, row in split_rows(source, splits, "validation")], source
    path = find_file(data_dir, [f"train-v{version}.json", "train*.json", "train*.jsonl"], EXPECTED)
    held_out = None
    if num_eval != 0 and Path(data_dir).expanduser().is_dir():
        kinds = [f"{name}*.{suffix}" for name in ("dev", "val", "test") for suffix in ("json", "jsonl")]
        try:
            held_out = _read_file(find_file(data_dir, [f"dev-v{version}.json", *kinds], EXPECTED), version)
        except FileNotFoundError:
            pass
    return _read_file(path, version), held_out, str(path)


def _read_file(path: Path, version: str) -> list[Row]:
    if path.suffix.lower() == ".json":
        try:
            document = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError:
            document = None  # JSON lines, or broken: `read_rows` says where
        if isinstance(document, dict) and "data" in document:
            rows = _published(path, document["data"], version)
            if not rows:
                raise ValueError(f"{str(path)!r} must hold at least one question, got none. {EXPECTED}")
            return rows
    return [_flat(where, row, version) for where, row in read_rows(path)]


def _published(path: Path, articles: Any, version: str) -> list[Row]:
    rows = []
    for article in articles:
        for paragraph in check_row(str(path), article).get("paragraphs", []):
            for qa in check_row(str(path), paragraph).get("qas", []):
                where = f"{str(path)!r}, question {check_row(str(path), qa).get('id')!r}"
                answers = [] if qa.get("is_impossible") else qa.get("answers")
                row = {"context": paragraph.get("context"), "question": qa.get("question"), "answers": answers}
                rows.append(_row(where, row, answers, version))
    return rows


def _flat(where: str, row: dict[str, Any], version: str) -> Row:
    if "answers" not in row:
        return _row(where, row, [{"text": text_of(where, row, "answer", EXPECTED)}], version)
    answers = row["answers"]
    if isinstance(answers, dict):
        texts, starts = answers.get("text") or [], answers.get("answer_start") or []
        if len(texts) != len(starts):
            raise ValueError(f"{where}: 'answers' must have as many texts as starts, got {answers!r}. {EXPECTED}")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    return _row(where, row, answers, version)


def _row(where: str, row: dict[str, Any], answers: Any, version: str) -> Row:
    context, question = (text_of(where, row, column, EXPECTED) for column in ("context", "question"))
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f"{where}: 'answers' must be a list of objects with text and answer_start, got {answers!r}")
    texts = tuple(text_of(where, answer, "text", EXPECTED) for answer in answers)
    if not all(text.strip() for text in texts):
        raise ValueError(f"{where}: an answer must not be empty, got {texts}. Fill it in or drop the row")
    if not texts and version != "2.0":
        raise ValueError(
            f"{where}: a question of version {version} must have an answer, got none. Drop it if it is unlabelled, or "
            "pass version=2.0 if it means that there is no answer"
        )
    start = answers[0].get("answer_start") if answers else None
    if texts and (not isinstance(start, int) or not context.startswith(texts[0], start)):
        start = context.find(texts[0])
    return Row(context, question, texts, start if texts and start is not None and start >= 0 else None)


# Cutting.


@dataclass
class _Cutter:
    """Cuts passages, at words, to what leaves a row within `max_length` tokens."""

    template: str
    no_answer: str
    tokenizer: Any
    max_length: int
    seed: int

    def around_answers(self, rows: list[Row]) -> list[Row]:
        """For training: a part that holds the answer, each equally likely, and the same for a seed and a row."""
        kept: list[Row | None] = list(rows)
        for index in self._too_long(rows, 0):
            row = rows[index]
            first, last = _span_of_words(row)
            kept[index] = None if row.answers and row.start is None else self._cut(row, 0, first, last)
        lost = kept.count(None)
        if lost:
            logger.warning(
                "%d of %d rows are left out: max_length=%d cuts their answer", lost, len(rows), self.max_length
            )
        return [row for row in kept if row is not None]

    def around_questions(self, rows: list[Row]) -> list[Row]:
        """For evaluation: the part with most of the question's words, the first of equals."""
        kept = list(rows)
        for index in self._too_long(rows, MAX_NEW_TOKENS):
            kept[index] = self._cut(rows[index], MAX_NEW_TOKENS, None, None) or replace(rows[index], context="")
        return kept

    def _too_long(self, rows: list[Row], reserve: int) -> list[int]:
        lengths = self._lengths(rows)
        return [index for index, length in enumerate(lengths) if length + reserve > self.max_length]

    def _lengths(self, rows: list[Row]) -> list[int]:
        """Tokens of each row as `data.tokenize` makes them, with the end."""
        if not rows:
            return []
        pairs = fill(self.template, ((vars(row), _answer(row, self.no_answer)) for row in rows))
        answers = self.tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
        return [
            max(1, len(prompt)) + len(answer) + 1
            for prompt, answer in zip(
                self.tokenizer([prompt for prompt, _ in pairs])["input_ids"], answers, strict=True
            )
        ]

    def _cut(self, row: Row, reserve: int, first: int | None, last: int | None) -> Row | None:
        """The row with a part of its passage that fits and holds words `first` to `last`, or `None` if there is none."""
        words = list(re.finditer(r"\S+", row.context))
        if not words:
            return None
        costs = [
            len(ids)
            for ids in self.tokenizer([f" {word.group()}" for word in words], add_special_tokens=False)["input_ids"]
        ]
        room = self.max_length - reserve - self._lengths([replace(row, context="")])[0]
        draw = random.Random(f"{self.seed}\n{row.question}\n{row.context}")
        while room > 0:
            parts = _parts(costs, room)
            if first is not None and last is not None:
                parts = [part for part in parts if part[0] <= first and last < part[1]]
            if not parts:
                return None
            if reserve:
                start, stop = _nearest_to(row.question, [word.group() for word in words], parts)
            else:
                start, stop = draw.choice(parts)
            begin = words[start].start()
            part = replace(row, context=row.context[begin : words[stop - 1].end()])
            part = replace(part, start=None if row.start is None else row.start - begin)
            excess = self._lengths([part])[0] + reserve - self.max_length
            if excess <= 0:
                return part
            room -= excess  # words cost more together than alone, as around line breaks
        return None


def _span_of_words(row: Row) -> tuple[int | None, int | None]:
    """The first and the last word that the answer touches."""
    if row.start is None:
        return None, None
    stop = row.start + len(row.answers[0])
    touched = [
        index
        for index, word in enumerate(re.finditer(r"\S+", row.context))
        if word.start() < stop and word.end() > row.start
    ]
    return touched[0], touched[-1]


def _parts(costs: Sequence[int], room: int) -> list[tuple[int, int]]:
    """All parts `[start, stop)` of at most `room` tokens that no word could be added to at the end."""
    parts, stop, total = [], 0, 0
    for start in range(len(costs)):
        if stop < start:
            stop, total = start, 0
        while stop < len(costs) and total + costs[stop] <= room:
            total += costs[stop]
            stop += 1
        if stop > start:
            parts.append((start, stop))
        if stop == len(costs):
            break
        total -= costs[start] if stop > start else 0
    return parts


def _nearest_to(question: str, words: list[str], parts: list[tuple[int, int]]) -> tuple[int, int]:
    asked = set(squad_normalize(question).split())
    normal = [squad_normalize(word) for word in words]
    return max(parts, key=lambda part: len(asked.intersection(normal[part[0] : part[1]])))
