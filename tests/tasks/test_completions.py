"""The user's own data: every format reads to the same rows, and bad input is named with its file and line."""

import csv
import json
import logging

import datasets
import pytest

from priors_peft.data import tokenize
from priors_peft.tasks import load_task


ROWS = [{"prompt": f"say {n}", "completion": f' {n}, "é"\nend'} for n in range(30)]


def load(**kwargs):
    return load_task("completions", **{key: str(value) if "file" in key else value for key, value in kwargs.items()})


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    task = load(train_file=write(tmp_path / f"a{suffix}", ROWS), num_eval=0)
    assert task.train.to_list() == ROWS
    assert task.eval is None


def test_json_lines_in_a_json_file_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8-sig")
    assert load(train_file=file, num_eval=0).train.to_list() == ROWS


def test_columns_of_another_name(tmp_path):
    file = write(tmp_path / "a.csv", [{"q": "1+1", "a": "2", "other": "x"}])
    task = load(train_file=file, prompt_column="q", completion_column="a", num_eval=0)
    assert task.train.to_list() == [{"prompt": "1+1", "completion": "2"}]


def test_files_are_looked_for_in_data_dir(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl", ROWS[:4])
    task = load(train_file="a.jsonl", eval_file="b.jsonl", data_dir=str(tmp_path))
    assert (len(task.train), len(task.eval)) == (30, 4)


@pytest.mark.parametrize(
    ("rows", "num_eval", "expected"), [(30, None, 3), (5, None, 1), (30, 7, 7), (9000, None, 512)]
)
def test_rows_are_held_out(tmp_path, rows, num_eval, expected):
    file = write(tmp_path / "a.jsonl", [{"prompt": f"{n}", "completion": "x"} for n in range(rows)])
    task = load(train_file=file, num_eval=num_eval)
    assert len(task.eval) == expected
    assert sorted(task.train["prompt"][:] + task.eval["prompt"][:]) == sorted(str(n) for n in range(rows))


def test_held_out_rows_are_a_function_of_the_seed(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    chosen = [load(train_file=file, num_train=10, seed=seed) for seed in (0, 0, 1)]
    assert chosen[0].eval.to_list() == chosen[1].eval.to_list() != chosen[2].eval.to_list()
    assert chosen[0].train.to_list() == chosen[1].train.to_list() != chosen[2].train.to_list()
    assert len(chosen[0].train) == 10


def test_copies_of_a_held_out_row_are_not_trained_on(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS[:5] * 4)
    task = load(train_file=file)
    assert not {row["prompt"] for row in task.eval} & {row["prompt"] for row in task.train}


def test_eval_file_that_repeats_training_rows_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load(train_file=write(tmp_path / "a.jsonl", ROWS), eval_file=write(tmp_path / "b.jsonl", ROWS[:2]))
    assert "2 evaluation rows" in caplog.text


def test_more_rows_asked_for_than_there_are_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        task = load(train_file=write(tmp_path / "a.jsonl", ROWS), num_train=1000, num_eval=0)
    assert len(task.train) == 30 and "num_train=1000" in caplog.text


@pytest.mark.parametrize(("completion", "expected"), [("12", 3), ("é", 3), ("x" * 1000, 256)])
def test_max_new_tokens_covers_the_longest_completion(tmp_path, completion, expected):
    file = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": completion}, {"prompt": "q", "completion": "1"}])
    assert load(train_file=file, num_eval=0).max_new_tokens == expected


GOOD = '{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"prompt": "p", "answer": "c"}\n',
            "a.jsonl', line 1: completion_column 'completion' is missing, the columns are prompt, answer",
        ),  # fmt: skip
        (
            "a.csv",
            "question,completion\na,b\n",
            "a.csv', line 2: prompt_column 'prompt' is missing, the columns are question, completion",
        ),  # fmt: skip
        ("a.jsonl", GOOD + '{"prompt": "p", "completion": " "}\n', "a.jsonl', line 2: 'completion' must not be empty"),
        ("a.csv", 'prompt,completion\n"two\nlines",b\nc,\n', "a.csv', line 4: 'completion' must not be empty"),
        ("a.json", '[{"prompt": "p", "completion": ""}]', "a.json', row 1: 'completion' must not be empty"),
        ("a.jsonl", GOOD + "\n" + '{"prompt": "p"\n', "a.jsonl', line 3: broken JSON"),
        ("a.json", '[\n{"prompt": "p",\n]', "a.json', line 3: broken JSON"),
        ("a.csv", 'prompt,completion\na,"b', "a.csv', line 2: broken CSV"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv', line 2: a row must have 2 cells"),
        ("a.csv", "prompt,completion\na\n", "a.csv', line 2: a row must have 2 cells"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "p", "completion": 5}\n',
            "a.jsonl', line 2: 'completion' must be a string, got 5 (int)",
        ),  # fmt: skip
        ("a.jsonl", '{"prompt": null, "completion": "c"}\n', "a.jsonl', line 1: 'prompt' must be a string, got None"),
        ("a.jsonl", "[1]\n", "a.jsonl', line 1: a row must be an object with columns, got list"),
        ("a.jsonl", "", "a.jsonl' must hold at least one row"),
        ("a.json", "[]", "a.json' must hold at least one row"),
        ("a.csv", "prompt,completion\n", "a.csv' must hold at least one row"),
        ("a.txt", GOOD, "a data file must be .jsonl, .json or .csv"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        load(train_file=tmp_path / name)
    assert message in str(error.value)


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.csv").write_bytes("prompt,completion\na,é\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv' must be UTF-8"):
        load(train_file=tmp_path / "a.csv")


@pytest.mark.parametrize("argument", ["train_file", "eval_file"])
def test_missing_file(tmp_path, argument):
    files = {"train_file": write(tmp_path / "a.jsonl", ROWS), argument: tmp_path / "none.jsonl"}
    with pytest.raises(FileNotFoundError, match=f"{argument} must be an existing file, got .*none.jsonl"):
        load(**files)


def test_one_row_can_not_be_held_out(tmp_path):
    with pytest.raises(ValueError, match="must leave rows to train on, got 1 rows"):
        load(train_file=write(tmp_path / "a.jsonl", ROWS[:1]))


@pytest.mark.parametrize("source", [{}, {"train_file": "a.jsonl", "dataset": "user/data"}])
def test_one_source_must_be_given(source):
    with pytest.raises(ValueError, match="needs one of train_file and dataset"):
        load(**source)


# Data sets: a folder is loaded by the same `load_dataset` as a Hub id.


def test_dataset_with_its_own_splits(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"prompt": "t", "completion": "u"}])
    task = load(dataset=str(tmp_path))
    assert task.train.to_list() == ROWS
    assert task.eval.to_list() == [{"prompt": "t", "completion": "u"}]


def test_dataset_without_an_evaluation_split_holds_out(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    task = load(dataset=str(tmp_path))
    assert (len(task.train), len(task.eval)) == (27, 3)


def test_dataset_with_bad_rows(tmp_path):
    write(tmp_path / "train.jsonl", [*ROWS, {"prompt": "p", "completion": ""}])
    with pytest.raises(ValueError, match="split 'train', row 31: 'completion' must not be empty"):
        load(dataset=str(tmp_path))
    with pytest.raises(ValueError, match="prompt_column 'q' is missing, the columns are prompt, completion"):
        load(dataset=str(tmp_path), prompt_column="q")


def test_dataset_out_of_reach(monkeypatch):
    def unreachable(name):
        raise ConnectionError(f"Couldn't reach {name}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match="dataset 'user/data' can't be loaded.*pass a file as train_file"):
        load(dataset="user/data")


# Conversations and plain text.

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "system", "content": "what"},
    {"role": "user", "content": "1 plus 2 ?"},
    {"role": "assistant", "content": "3"},
]


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_conversations_go_through_the_chat_template(tmp_path, chat_tokenizer, suffix):
    file = write(tmp_path / f"a{suffix}", [{"messages": TALK}, {"messages": TALK[1:]}])
    task = load(train_file=file, num_eval=0, tokenizer=chat_tokenizer)
    assert task.train[0] == {"prompt": "<s>[system] what\n[user] 1 plus 2 ?\n[assistant] ", "completion": "3</s>"}
    whole = chat_tokenizer.apply_chat_template(TALK[1:], tokenize=False)
    assert task.train[1]["prompt"] + task.train[1]["completion"] == whole.rstrip()


def test_a_conversation_has_each_special_token_once(tmp_path, chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    task = load(train_file=write(tmp_path / "a.jsonl", [{"messages": TALK}]), num_eval=0, tokenizer=chat_tokenizer)
    (ids,) = tokenize(task.train, chat_tokenizer)["input_ids"]
    assert ids.count(chat_tokenizer.bos_token_id) == 1 and ids[0] == chat_tokenizer.bos_token_id
    assert ids.count(chat_tokenizer.eos_token_id) == 1 and ids[-1] == chat_tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_plain_text_is_learnt_whole(tmp_path, tokenizer, name):
    task = load(train_file=write(tmp_path / name, [{"text": "what is 1 ?", "source": "x"}]), num_eval=0)
    assert task.train.to_list() == [{"prompt": "", "completion": "what is 1 ?"}]
    (labels,) = tokenize(task.train, tokenizer)["labels"]
    assert [label for label in labels if label >= 0] == tokenizer("what is 1 ?")["input_ids"] + [
        tokenizer.eos_token_id
    ]


def test_a_data_set_of_conversations_or_text(tmp_path, chat_tokenizer):
    for name, rows in (("talk", [{"messages": TALK}] * 3), ("text", [{"text": "what"}] * 3)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
        task = load(dataset=str(tmp_path / name), num_eval=0, tokenizer=chat_tokenizer)
        assert task.train[2]["completion"] == {"talk": "3</s>", "text": "what"}[name]


@pytest.mark.parametrize("rows", [[{"messages": TALK}, {"messages": TALK[1:]}], [{"text": "what is 1 ?"}] * 2])
def test_rows_in_python_are_what_they_are_in_a_file(tmp_path, chat_tokenizer, rows):
    task = load(train_file=write(tmp_path / "a.jsonl", rows), num_eval=0, tokenizer=chat_tokenizer)
    expected = tokenize(task.train, chat_tokenizer).to_list()
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    for given in (rows, datasets.Dataset.from_list(rows), stream):
        assert list(tokenize(given, chat_tokenizer)) == expected


def test_prompt_and_completion_win_over_other_columns(tmp_path):
    row = {"prompt": "p", "completion": "c", "text": "t"}
    assert load(train_file=write(tmp_path / "a.jsonl", [row]), num_eval=0).train[0]["completion"] == "c"
    with pytest.raises(ValueError, match="prompt_column 'q' is missing"):
        load(train_file=write(tmp_path / "b.jsonl", [{"text": "t"}]), prompt_column="q")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "line 1: 'messages' must be a list of objects with role and content, got 'hello'"),
        ([{"role": "user"}], "line 1: 'messages' must be a list of objects with role and content"),
        (TALK[:2], "line 1: the last of 'messages' must be what the assistant answers, got roles ['system', 'user']"),
        (TALK[2:], "got roles ['assistant']"),
        ([*TALK[:2], {"role": "assistant", "content": " "}], "must be what the assistant answers"),
    ],
)
def test_bad_conversations(tmp_path, chat_tokenizer, messages, message):
    with pytest.raises(ValueError) as error:
        load(train_file=write(tmp_path / "a.jsonl", [{"messages": messages}]), tokenizer=chat_tokenizer)
    assert message in str(error.value)


def test_conversations_need_a_chat_template(tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(ValueError, match="need a tokenizer with a chat template, got no tokenizer"):
        load(train_file=file)
    with pytest.raises(ValueError, match="got TokenizersBackend without one|got PreTrainedTokenizerFast without one"):
        load(train_file=file, tokenizer=tokenizer)


def test_a_template_that_rewrites_what_was_said_is_refused(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages | length }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(
        ValueError, match="the chat template must render a conversation as its beginning and the answer"
    ):
        load(train_file=write(tmp_path / "a.jsonl", [{"messages": TALK}]), tokenizer=tokenizer)
