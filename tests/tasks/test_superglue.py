"""SuperGLUE: published files and the Hub's numbers give the same rows, and every class has a text."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest

from priors_peft.tasks import load_task
from priors_peft.tasks.superglue import SUBTASKS


WSC = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 5}
# One row of each class as published, in the order of the classes; the Hub has its number for a label.
PUBLISHED = {
    "rte": [
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
        {"premise": "It rains.", "hypothesis": "It is dry.", "label": "not_entailment"},
    ],
    "wsc": [
        {"text": "Mark told Pete a lie. He laughed.", "target": WSC, "label": False},
        {"text": "Mark told Pete a lie. He lied.", "target": WSC, "label": True},
    ],
    "boolq": [
        {"question": "is the sky green", "passage": "The sky is blue.", "label": False},
        {"question": "is the sky blue", "passage": "The sky is blue.", "label": True},
    ],
    "wic": [
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "My bank closed.", "label": False, "version": 1.1},
        {"word": "bank", "sentence1": "A bank failed.", "sentence2": "My bank closed.", "label": True, "version": 1.1},
    ],
    "cb": [
        {"premise": "He knows it rained.", "hypothesis": "it rained.", "label": "entailment"},
        {"premise": "He denies it rained.", "hypothesis": "it rained.", "label": "contradiction"},
        {"premise": "He hopes it rained.", "hypothesis": "it rained.", "label": "neutral"},
    ],
    "copa": [
        {"premise": "The grass got wet.", "choice1": "It rained.", "choice2": "I slept.", "question": "cause", "label": 0},
        {"premise": "It rained.", "choice1": "I burned.", "choice2": "I got wet.", "question": "effect", "label": 1},
    ],
}  # fmt: skip


def write(folder, rows, name="train"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row | {"idx": n}) + "\n" for n, row in enumerate(rows)))


@pytest.fixture
def archive(tmp_path):
    for subtask, rows in PUBLISHED.items():
        for name in ("train", "val"):
            write(tmp_path / SUBTASKS[subtask].folder, rows, name)
        unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in rows]
        write(tmp_path / SUBTASKS[subtask].folder, unlabelled, "test")
    return str(tmp_path)


def on_the_hub(subtask, labelled=True):
    """The rows as the Hub has them: labels are numbers, WSC's spans are columns."""
    rows = [
        {key: value for key, value in row.items() if key != "target"} | row.get("target", {})
        for row in PUBLISHED[subtask]
    ]
    rows = [row | {"label": number if labelled else -1} for number, row in enumerate(rows)]
    features = datasets.Dataset.from_list(rows).features
    return datasets.Dataset.from_list(rows, features=datasets.Features({**features, "label": datasets.ClassLabel(names=list(SUBTASKS[subtask].verbalizer))}))  # fmt: skip


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_published_files_and_the_hub_give_the_same_rows(archive, monkeypatch, subtask):
    hub = datasets.DatasetDict(train=on_the_hub(subtask), validation=on_the_hub(subtask))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or hub)
    local, remote = (
        load_task("superglue", subtask=subtask.upper(), data_dir=archive),
        load_task("superglue", subtask=subtask),
    )
    assert asked == [("aps/super_glue", subtask)]
    assert local.train.to_list() == remote.train.to_list() and local.eval.to_list() == remote.eval.to_list()
    assert len(local.train) == len(PUBLISHED[subtask]) and local.description
    # Each row here is of the class of its number.
    for number, row in enumerate(local.eval):
        assert row["completion"] == row["choices"][number] and len(set(row["choices"])) == len(PUBLISHED[subtask])
    assert set(local.metrics(local.eval["completion"][:], local.eval["completion"][:]).values()) == {1.0}


@pytest.mark.slow
def test_the_real_client_loads_the_hubs_parquet_files(archive, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    splits = {split: f"rte/{split}-00000-of-00001.parquet" for split in ("train", "validation")}
    listed = "".join(f"  - split: {split}\n    path: rte/{split}-*\n" for split in splits)
    files = {"README.md": f"---\nconfigs:\n- config_name: rte\n  data_files:\n{listed}---\n".encode()}
    for path in splits.values():
        on_the_hub("rte").to_parquet(tmp_path / "part.parquet")
        files[path] = (tmp_path / "part.parquet").read_bytes()
    hub.create("datasets/aps/super_glue")
    hub.commit("datasets/aps/super_glue", "main", "data", files)
    remote, local = load_task("rte"), load_task("rte", data_dir=archive)
    assert remote.train.to_list() == local.train.to_list() and remote.eval.to_list() == local.eval.to_list()
    assert remote.dataset == "aps/super_glue" and hub.counted(r"GET /datasets/aps/super_glue/resolve/.*parquet")
    with pytest.raises(
        OSError, match="dataset 'user/none' can't be loaded .* pass a folder with SuperGLUE's jsonl files"
    ):
        load_task("rte", dataset="user/none")
    datasets.Dataset.from_dict({"other": [1]}).to_parquet(tmp_path / "part.parquet")
    for name, content in (("damaged", b"no parquet"), ("mixed", (tmp_path / "part.parquet").read_bytes())):
        hub.create(f"datasets/user/{name}")
        hub.commit(f"datasets/user/{name}", "main", "data", files | {splits["validation"]: content})
        with pytest.raises(
            ValueError, match=f"dataset 'user/{name}' can't be built .* pass a folder with .* as data_dir"
        ):
            load_task("rte", dataset=f"user/{name}")


def test_the_hubs_own_names_of_classes_win_over_our_order(monkeypatch):
    rows = on_the_hub("rte").cast_column("label", datasets.ClassLabel(names=["not_entailment", "entailment"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict(train=rows))
    assert load_task("superglue", subtask="rte", num_eval=0).train["completion"][:] == [" no", " yes"]


def test_copa_is_one_sentence_and_its_choices_are_the_answers(archive):
    rows = load_task("superglue", subtask="copa", data_dir=archive).eval.to_list()
    assert rows[0] == {
        "prompt": "The grass got wet because",
        "completion": " it rained.",
        "choices": [" it rained.", " I slept."],
    }
    assert rows[1]["prompt"] + rows[1]["completion"] == "It rained so I got wet."


@pytest.mark.parametrize(
    ("text", "target", "marked"),
    [
        ("Mark told Pete a lie. He lied.", WSC, "*Mark* told Pete a lie. _He_ lied."),
        # The index is off by one; a later word is the same; a longer word begins with it; a line break is inside it.
        ("Emma's mother saw it use it up.", {"span1_text": "Emma", "span1_index": 0, "span2_text": "it", "span2_index": 6}, "*Emma*'s mother saw it use _it_ up."),
        ("He saw Heather.", {"span1_text": "Heather", "span1_index": 2, "span2_text": "He", "span2_index": 2}, "_He_ saw *Heather*."),
        ("The old man said he sat.", {"span1_text": "the old\nman", "span1_index": 0, "span2_text": "he", "span2_index": 4}, "*The old man* said _he_ sat."),
    ],
)  # fmt: skip
def test_wsc_marks_the_two_spans(tmp_path, text, target, marked):
    write(tmp_path / "WSC", [{"text": text, "target": target, "label": True}])
    task = load_task("superglue", subtask="wsc", data_dir=str(tmp_path), num_eval=0)
    assert task.train["prompt"][0].split("\n")[0] == marked


def test_metrics_by_hand(archive):
    task = load_task("superglue", subtask="cb", data_dir=archive)
    gold = [" true", " true", " false", " neither"]
    found = task.metrics(["true", "false\nQuestion: more", "false", "nothing"], gold)
    # F1: true 2·1/(1+2) = 2/3, false 2·1/(2+1) = 2/3, neither 0; "nothing" is no class and only wrong.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(4 / 9)}
    assert load_task("superglue", subtask="rte", data_dir=archive).metrics(["yes"], [" no"]) == {"accuracy": 0.0}


def test_fewglue_is_evaluated_on_validation_rows_or_on_its_32(tmp_path):
    rows = PUBLISHED["boolq"]
    for name, count in (("train", 2), ("dev32", 1)):
        write(tmp_path / "BoolQ", rows[:count], name)
    settings = {"subtask": "boolq", "data_dir": str(tmp_path)}
    assert len(load_task("superglue", **settings).eval) == 1
    write(tmp_path / "BoolQ", rows, "val")
    assert len(load_task("superglue", **settings).eval) == 2
    assert len(load_task("superglue", **settings, eval_split="dev32").eval) == 1
    # The subtask's own folder will do, too.
    assert len(load_task("superglue", subtask="boolq", data_dir=str(tmp_path / "BoolQ")).eval) == 2


def test_rows_are_held_out_where_there_are_none_to_evaluate_on(tmp_path):
    write(tmp_path, [row | {"premise": f"{n}"} for n in range(20) for row in PUBLISHED["rte"]])
    task = load_task("superglue", subtask="rte", data_dir=str(tmp_path), num_eval=6)
    assert (len(task.train), len(task.eval)) == (34, 6)
    assert not set(task.train["prompt"]) & set(task.eval["prompt"])


def test_another_template_and_verbalizer(archive):
    # As YAML reads `true: right`.
    settings = {"template": "{passage}|{question}", "verbalizer": {True: "right", "false": "wrong"}}
    task = load_task("superglue", subtask="boolq", data_dir=archive, **settings)
    assert task.eval[1] == {
        "prompt": "The sky is blue.|is the sky blue",
        "completion": " right",
        "choices": [" wrong", " right"],
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subtask": "rtee"}, "subtask must be one of rte, wsc, boolq, wic, cb, copa, got 'rtee'. Did you mean 'rte'?"),
        ({"subtask": "multirc"}, "subtask must be one of rte, wsc"),
        ({"verbalizer": {"entailment": "yes"}}, "a text for each class of rte, got none for 'not_entailment'"),
        ({"verbalizer": {"entailment": "a", "not_entailment": "b", "neutral": "c"}}, "a class in the verbalizer of rte must be one of entailment, not_entailment, got 'neutral'"),
        ({"verbalizer": {"entailment": True, "not_entailment": False}}, "verbalizer['entailment'] must be text, got True (bool). Put it in quotes"),
        ({"verbalizer": {"entailment": "a", "not_entailment": " a"}}, "must tell the classes of rte apart"),
        ({"verbalizer": {"entailment": "a", "not_entailment": " "}}, "verbalizer['not_entailment'] must not be empty"),
        ({"verbalizer": "yes"}, "verbalizer must map classes to texts, got 'yes'"),
        ({"template": "{premis} {hypothesis}"}, "must be one of premise, hypothesis, got 'premis'. Did you mean 'premise'"),
        ({"eval_split": "test"}, "test.jsonl', line 1: a row must be labelled, got no label: SuperGLUE's test rows have none"),
    ],
)  # fmt: skip
def test_bad_settings(archive, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("superglue", **{"subtask": "rte", "data_dir": archive} | settings)


def test_the_hubs_unlabelled_rows_are_refused(monkeypatch):
    hub = datasets.DatasetDict(train=on_the_hub("rte"), test=on_the_hub("rte", labelled=False))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: hub)
    with pytest.raises(ValueError, match="split 'test', row 1: a row must be labelled"):
        load_task("superglue", subtask="rte", eval_split="test")
    with pytest.raises(ValueError, match="must have a split 'dev', got train, test"):
        load_task("superglue", subtask="rte", eval_split="dev")


@pytest.mark.parametrize(
    ("subtask", "row", "message"),
    [
        ("rte", {"premise": "p", "label": "entailment"}, "line 1: 'hypothesis' is missing, the columns are premise, label, idx. Expected the columns of RTE"),
        ("rte", {"premise": "p", "hypothesis": "h", "label": "maybe"}, "label must be one of entailment, not_entailment or their number, got 'maybe'"),
        ("rte", {"premise": "p", "hypothesis": "h", "label": 2}, "label must be one of entailment, not_entailment or their number, got 2"),
        ("copa", PUBLISHED["copa"][0] | {"question": "why"}, "'question' must be cause or effect, got 'why'"),
        ("wsc", PUBLISHED["wsc"][0] | {"target": WSC | {"span1_text": "Mary"}}, "span1_text must stand in the text, got 'Mary'"),
        ("wsc", PUBLISHED["wsc"][0] | {"target": {}}, "'span1_text' is missing"),
    ],
)  # fmt: skip
def test_bad_rows(tmp_path, subtask, row, message):
    write(tmp_path / SUBTASKS[subtask].folder, [row])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_task("superglue", subtask=subtask, data_dir=str(tmp_path), num_eval=0)


def test_a_missing_file_says_what_was_expected(archive, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="Expected RTE/train.jsonl and RTE/val.jsonl.*aps/super_glue is loaded"
    ):
        load_task("superglue", subtask="rte", data_dir=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="data_dir must hold dev32.jsonl"):
        load_task("superglue", subtask="rte", data_dir=archive, eval_split="dev32")


@pytest.mark.skipif("PRIORS_PEFT_DATA_DIR" not in os.environ, reason="PRIORS_PEFT_DATA_DIR is not set")
@pytest.mark.parametrize(
    ("subtask", "rows", "yes"),
    [("rte", (2490, 277), 146), ("wsc", (554, 104), 38), ("boolq", (32, 3270), 2033), ("wic", (32, 638), 319)],
)
def test_real_rows(subtask, rows, yes):
    task = load_task(
        "superglue", subtask=subtask, data_dir=str(Path(os.environ["PRIORS_PEFT_DATA_DIR"]) / "superglue")
    )
    assert (len(task.train), len(task.eval)) == rows
    assert task.eval["completion"][:].count(" yes") == yes
    if subtask == "wsc":
        for prompt in task.train["prompt"]:
            text, question = prompt.split("\nQuestion: ")
            noun, pronoun = re.fullmatch(
                r"Does the pronoun _(.+)_ refer to \*(.+)\*\? Yes or no\?\nAnswer:", question
            ).groups()[::-1]
            assert f"*{noun}*".lower() in " ".join(text.split()).lower() and f"_{pronoun}_" in text
