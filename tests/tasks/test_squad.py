"""SQuAD: one reading of every format it comes in, the official metric, and cuts that never lose an answer."""

import json
import logging
import os
import re
from pathlib import Path

import datasets
import pytest
from conftest import make_tokenizer

from priors_peft.data import tokenize
from priors_peft.tasks import load_task
from priors_peft.tasks.squad import SquadMetric


PASSAGES = [
    ("The Normans came to Normandy in the 10th century.", "Where did the Normans come to?", "Normandy", 20),
    ("Oxygen has the symbol O and the number 8, and oxygen burns.", "What is oxygen's number?", "8", 39),
    ("Warsaw lies on the Vistula.", "On which river does Warsaw lie?", "the Vistula", 15),
]


def qa(index, question, answer, start, **extra):
    answers = [{"text": answer, "answer_start": start}, {"text": answer.removeprefix("the "), "answer_start": start}]
    return {"id": str(index), "question": question, "answers": answers, **extra}


def published(rows, version="1.1", impossible=()):
    """SQuAD's own JSON, one paragraph a row."""
    paragraphs = []
    for index, (context, question, answer, start) in enumerate(rows):
        found = qa(index, question, answer, start)
        if index in impossible:
            found |= {"is_impossible": True, "answers": [], "plausible_answers": found["answers"]}
        paragraphs.append({"context": context, "qas": [found]})
    return {"version": version, "data": [{"title": "T", "paragraphs": paragraphs}]}


def hub_rows(rows):
    return [
        {
            "id": str(index),
            "title": "T",
            "context": context,
            "question": question,
            "answers": {"text": [answer, answer.removeprefix("the ")], "answer_start": [start, start]},
        }
        for index, (context, question, answer, start) in enumerate(rows)
    ]


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    lines = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
    (folder / name).write_text(lines, encoding="utf-8")
    return str(folder)


def test_every_format_gives_the_same_rows(tmp_path, monkeypatch):
    folder = write(tmp_path / "published", "train-v1.1.json", published(PASSAGES))
    write(tmp_path / "published", "dev-v1.1.json", published(PASSAGES[:1]))
    lines = write(tmp_path / "lines", "train.jsonl", hub_rows(PASSAGES))
    write(tmp_path / "lines", "validation.jsonl", hub_rows(PASSAGES[:1]))
    hub = datasets.DatasetDict(
        train=datasets.Dataset.from_list(hub_rows(PASSAGES)),
        validation=datasets.Dataset.from_list(hub_rows(PASSAGES[:1])),
    )
    names = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: names.append(name) or hub)
    tasks = [load_task("squad", data_dir=folder), load_task("squad", data_dir=lines), load_task("squad")]
    assert names == ["rajpurkar/squad"]
    for task in tasks:
        assert task.train.to_list() == tasks[0].train.to_list() and task.eval.to_list() == tasks[0].eval.to_list()
    assert task.train[2] == {
        "prompt": "Warsaw lies on the Vistula.\nQuestion: On which river does Warsaw lie?\nAnswer:",
        "completion": " the Vistula",
    }
    flat = [{"context": c, "question": q, "answer": a} for c, q, a, _ in PASSAGES]
    task = load_task("squad", data_dir=write(tmp_path / "flat", "train_sample.json", flat), num_eval=0)
    assert task.train.to_list() == tasks[0].train.to_list() and task.eval is None


def test_version_2_is_loaded_from_its_own_hub_id(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(ConnectionError(name)))
    with pytest.raises(
        OSError, match="'rajpurkar/squad_v2' can't be loaded.*pass a folder with SQuAD's JSON as data_dir"
    ):
        load_task("squad", version=2.0)


def test_all_gold_answers_reach_the_metric(tmp_path):
    folder = write(tmp_path, "train-v1.1.json", published(PASSAGES))
    write(tmp_path, "dev-v1.1.json", published(PASSAGES[2:]))
    task = load_task("squad", data_dir=folder)
    assert task.eval["answers"][:] == [["the Vistula", "Vistula"]]
    # "A" and the dot go; what follows on the next line is no part of the answer.
    assert task.metrics([" A Vistula.\nQuestion: what else"], task.eval["answers"][:]) == {
        "exact_match": 1.0,
        "f1": 1.0,
    }


def test_questions_without_an_answer(tmp_path):
    folder = write(tmp_path, "train-v2.0.json", published(PASSAGES, "v2.0", impossible=[1]))
    write(tmp_path, "dev-v2.0.json", published(PASSAGES, "v2.0", impossible=[1]))
    task = load_task("squad", data_dir=folder, version="2.0", no_answer="no answer")
    assert task.train["completion"][:] == [" Normandy", " no answer", " the Vistula"]
    gold = task.eval["answers"][:]
    assert gold[1] == []
    # The official score of version 2.0: saying that there is none is right where there is none, and wrong elsewhere;
    # a word in common with the phrase for it is worth nothing.
    assert task.metrics([" Normandy", " No answer.", " Vistula"], gold) == {"exact_match": 1.0, "f1": 1.0}
    assert task.metrics([" no answer", " answer", " Vistula"], gold)["f1"] == pytest.approx(1 / 3)


def test_the_metric_is_one_of_evaluate_and_needs_no_network():
    import evaluate

    metric = SquadMetric()
    for prediction, gold in (("the Denver Broncos!", ["Broncos", "Denver Broncos"]), ("in 1999", ["1999"]), ("", [])):
        metric.add(prediction=prediction, reference=gold)
    found = metric.compute()
    assert found["exact_match"] == pytest.approx(2 / 3) and found["f1"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    combined = evaluate.combine([SquadMetric()])
    assert combined.compute(predictions=["a cat"], references=["the cat"]) == {"exact_match": 1.0, "f1": 1.0}


def test_no_passage_is_on_both_sides_when_rows_are_held_out(tmp_path):
    rows = [{"context": f"Passage {n // 3}.", "question": f"q{n}?", "answer": str(n)} for n in range(60)]
    task = load_task("squad", data_dir=write(tmp_path, "train.json", rows), num_eval=5)
    passages = [{prompt.split("\n")[0] for prompt in part["prompt"]} for part in (task.train, task.eval)]
    assert len(task.eval) == 5 and not passages[0] & passages[1]


# Cutting: a word is a token of the tokenizer of the tests.


@pytest.fixture
def long_passages(tmp_path):
    """Eighty numbers in a row, one of them asked for."""
    context = " ".join(map(str, range(80)))
    rows = [
        {"context": context, "question": f"is {n % 60 + 10} what ?", "answer": str(n % 60 + 10)} for n in range(120)
    ]
    write(tmp_path, "train.json", rows)
    return write(tmp_path, "dev.json", rows[:40])


def passage_of(row):
    return row["prompt"].split("\nQuestion:")[0].split()


def test_a_long_passage_keeps_its_answer_and_the_row_fits(long_passages):
    tokenizer = make_tokenizer()
    task = load_task("squad", data_dir=long_passages, tokenizer=tokenizer, max_length=40)
    assert len(task.train) == 120
    assert all(row["completion"].strip() in passage_of(row) for row in task.train)
    assert all(row["prompt"].endswith("what ?\nAnswer:") for row in task.train)
    lengths = [len(ids) for ids in tokenize(task.train, tokenizer)["input_ids"]]
    # All of the window is used, and no more: tokenizing would drop nothing.
    assert set(lengths) == {40}


def test_where_the_answer_stands_in_a_cut_passage_says_nothing(long_passages):
    task = load_task("squad", data_dir=long_passages, tokenizer=make_tokenizer(), max_length=30)
    places = [passage_of(row).index(row["completion"].strip()) / len(passage_of(row)) for row in task.train]
    # Even over the window: were it centred, no answer would be in its outer quarters; at its front, all would be.
    quarters = [sum(low <= place < low + 0.25 for place in places) for low in (0, 0.25, 0.5, 0.75)]
    assert min(quarters) > 15 and max(quarters) < 45


def test_cuts_are_a_function_of_the_seed_and_the_row_alone(long_passages):
    settings = {"data_dir": long_passages, "tokenizer": make_tokenizer(), "max_length": 30}
    first, again, other = (load_task("squad", seed=seed, **settings).train["prompt"][:] for seed in (0, 0, 1))
    assert first == again and first != other
    some = load_task("squad", seed=0, num_train=20, **settings).train["prompt"][:]
    assert set(some) <= set(first)


def test_evaluation_keeps_the_part_that_shares_words_with_the_question(long_passages):
    tokenizer = make_tokenizer()
    task = load_task("squad", data_dir=long_passages, tokenizer=tokenizer, max_length=100)
    prompts = tokenize(task.eval, tokenizer)["input_ids"]
    assert all(passage_of(row) != list(map(str, range(80))) for row in task.eval)
    # All would fit but for what is generated. The question names the number here, so that its part is found; and there is room left to generate.
    assert all(row["completion"].strip() in passage_of(row) for row in task.eval)
    assert max(map(len, prompts)) + task.max_new_tokens <= 100


def test_what_fits_is_not_cut(long_passages):
    whole = load_task("squad", data_dir=long_passages)
    cut = load_task("squad", data_dir=long_passages, tokenizer=make_tokenizer(), max_length=200)
    assert whole.train.to_list() == cut.train.to_list() and whole.eval.to_list() == cut.eval.to_list()


def test_an_answer_that_does_not_fit_is_left_out_and_counted(tmp_path, caplog):
    context = " ".join(map(str, range(80)))
    rows = [{"context": context, "question": "what ?", "answer": answer} for answer in ("70", context[:100])]
    with caplog.at_level(logging.WARNING):
        folder = write(tmp_path, "train.json", rows)
        task = load_task("squad", data_dir=folder, num_eval=0, tokenizer=make_tokenizer(), max_length=30)
    assert task.train["completion"][:] == [" 70"]
    assert "1 of 2 rows are left out: max_length=30" in caplog.text
    with pytest.raises(ValueError, match="max_length must leave room for a question and its answer, got 5"):
        load_task("squad", data_dir=folder, num_eval=0, tokenizer=make_tokenizer(), max_length=5)


def test_another_template(tmp_path):
    folder = write(tmp_path, "train.json", hub_rows(PASSAGES))
    task = load_task("squad", data_dir=folder, num_eval=0, template="Q: {question}\n{{C}}: {context}\n")
    assert task.train[0] == {"prompt": f"Q: {PASSAGES[0][1]}\n{{C}}: {PASSAGES[0][0]}\n", "completion": "Normandy"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "1.2"}, "version must be 1.1 or 2.0, got '1.2'"),
        ({"template": "{contxt}"}, "a field in template '{contxt}' must be one of context, question, got 'contxt'. Did you mean 'context'?"),
        ({"template": "{context.__class__}"}, "got 'context.__class__'"),
        ({"template": "{}"}, "a field in template '{}' must be one of context, question, got ''"),
        ({"template": "{context"}, "template must be a Python format string"),
        ({"template": True}, "template must be text, got True (bool)"),
        ({"no_answer": "the"}, "no_answer must be text with a word in it"),
        ({"max_length": 10}, "max_length counts tokens, got 10 without a tokenizer"),
        ({"dataset": "x"}, "one of data_dir and dataset must be given"),
    ],
)  # fmt: skip
def test_bad_settings(tmp_path, settings, message):
    folder = write(tmp_path, "train.json", hub_rows(PASSAGES))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("squad", data_dir=folder, **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", [{"context": "c", "question": "q"}], "row 1: 'answer' is missing, the columns are context, question. Expected SQuAD's own JSON"),
        ("train.jsonl", [{"passage": "c", "question": "q", "answer": "c"}], "line 1: 'context' is missing"),
        ("train.json", published(PASSAGES, impossible=[1]), "question '1': a question of version 1.1 must have an answer, got none"),
        ("train.json", {"data": []}, "must hold at least one question, got none"),
        ("train.json", {"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "x", "question": "q"}]}]}]}, "question 'x': 'answers' must be a list of objects"),
        ("train.json", [{"context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": []}}], "as many texts as starts"),
        ("train.json", [{"context": "c", "question": "q", "answer": " "}], "an answer must not be empty"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    folder = write(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        load_task("squad", data_dir=folder)
    assert message in str(error.value)


def test_a_missing_file_says_what_was_expected(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder, got in ((tmp_path, "holds notes.txt"), (tmp_path / "none", "does not exist")):
        with pytest.raises(
            FileNotFoundError, match=rf"train-v1.1.json.*{got}.*dev-v1.1.json.*rajpurkar/squad is loaded"
        ):
            load_task("squad", data_dir=str(folder))
    for name in ("train_a.json", "train_b.json"):
        write(tmp_path, name, hub_rows(PASSAGES))
    with pytest.raises(
        ValueError, match=r"one file train\*.json, got train_a.json, train_b.json.*Pass the file itself"
    ):
        load_task("squad", data_dir=str(tmp_path))
    assert len(load_task("squad", data_dir=str(tmp_path / "train_a.json"), num_eval=0).train) == 3


@pytest.mark.skipif("PRIORS_PEFT_DATA_DIR" not in os.environ, reason="PRIORS_PEFT_DATA_DIR is not set")
def test_every_real_answer_stays_in_its_cut_passage():
    from transformers import AutoTokenizer

    folder = Path(os.environ["PRIORS_PEFT_DATA_DIR"]) / "squad"
    model = os.environ.get("PRIORS_PEFT_TINY_MODEL")
    tokenizer, length = (AutoTokenizer.from_pretrained(model), 400) if model else (make_tokenizer(), 100)
    whole = load_task("squad", data_dir=str(folder), num_train=400, num_eval=50)
    task = load_task("squad", data_dir=str(folder), num_train=400, num_eval=50, tokenizer=tokenizer, max_length=length)
    assert len(task.train) == 400
    assert sum(a["prompt"] != b["prompt"] for a, b in zip(whole.train, task.train, strict=True)) > 40
    for before, after in zip(whole.train, task.train, strict=True):
        kept = after["prompt"].split("\nQuestion: ")[0]
        assert after["completion"].strip() in kept and kept in before["prompt"]
    lengths = [len(ids) for part in (task.train, task.eval) for ids in tokenize(part, tokenizer)["input_ids"]]
    assert max(lengths) <= length
    right = [answers[0] for answers in task.eval["answers"]]
    assert task.metrics(right, task.eval["answers"][:]) == {"exact_match": 1.0, "f1": 1.0}
