"""What TensorBoard, trackio and Weights & Biases hold after a training: read back, without a network."""

import importlib
import io
import json
import sys
from functools import partial

import pytest
import test_trainer
from conftest import addition_rows, make_model, make_tokenizer, save_base
from test_trainer import make_trainer
from transformers import TrainerCallback

from priors_peft import PriorConfig, PriorTrainer, get_prior_model, tracking
from priors_peft.cli import main


FIGURES = ["nll", "log_prob", "weight", "effective_rank", "mean_pairwise_cosine", "drift"]
PICTURES = {"prior/geometry", "prior/posterior", "prior/projection", "prior/tokens"}
TABLE = "prior/nearest_tokens"


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """trackio's database, in a folder of the test's."""
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    for module in [module for name, module in sys.modules.items() if name.startswith("trackio")]:
        for name, folder in (("TRACKIO_DIR", tmp_path / "trackio"), ("MEDIA_DIR", tmp_path / "trackio" / "media")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, folder)
    return storage.SQLiteStorage


def logged(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.slow
def test_tensorboard_and_trackio_hold_figures_a_table_and_pictures(tmp_path, storage):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    image = pytest.importorskip("PIL.Image")
    trainer = make_trainer(
        tmp_path / "mine", report_to=["tensorboard", "trackio"], project="tests", run_name="one", max_steps=2
    )
    trainer.train()
    figures = trainer.evaluate()
    importlib.import_module("trackio").finish()  # as when the process ends
    logs = storage.get_logs("tests", "one")
    assert [log["eval/loss"] for log in logs if "eval/loss" in log] == [pytest.approx(figures["eval_loss"])]
    ((rows, pictures),) = [
        (log[TABLE]["_value"], {name: log[name]["file_path"] for name in PICTURES}) for log in logs if TABLE in log
    ]

    (folder,) = (tmp_path / "mine" / "runs").iterdir()
    events = reader.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    for name in FIGURES:
        expected = {step: pytest.approx(entry[f"prior/{name}"]) for step, entry in logged(trainer).items()}
        assert {event.step: event.value for event in events.Scalars(f"train/prior/{name}")} == expected
        of_runs = {log["train/global_step"]: log for log in logs if "train/loss" in log}
        assert {step: log[f"train/prior/{name}"] for step, log in of_runs.items()} == expected

    (text,) = events.Tensors(f"{TABLE}/text_summary")
    cells = [line.split(" | ") for line in text.tensor_proto.string_val[0].decode().splitlines()[2:]]
    assert [int(row["virtual token"]) for row in rows] == [0, 1, 2, 3] and text.step == 2
    for row, (_, before, now, cosine, _) in zip(rows, cells, strict=True):
        assert (before, now) == (f"<code>{row['nearest at the start']}</code>", f"<code>{row['nearest now']}</code>")
        assert float(cosine) == row["cosine"] <= 1 and 0.01 <= row["p-value"] <= 1

    assert set(events.Tags()["images"]) == PICTURES
    for name in PICTURES:
        (event,) = events.Images(name)
        drawn = image.open(io.BytesIO(event.encoded_image_string))
        again = image.open(tmp_path / "trackio" / "media" / pictures[name]).convert("RGB")
        assert drawn.width == 1200 and drawn.tobytes() == again.tobytes() and event.step == 2


@pytest.mark.slow
def test_the_commands_evaluation_is_in_the_runs_record(tmp_path, storage, monkeypatch):
    monkeypatch.setattr(tracking, "look", lambda *given: ({}, {}))
    rows = "".join(json.dumps(row) + "\n" for row in addition_rows(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    flags = ["--model", save_base(tmp_path / "base"), "--train_file", str(tmp_path / "rows.jsonl"), "--use_cpu"]
    flags += ["--max_steps", "2", "--logging_steps", "1", "--report_to", "trackio", "--project", "tests"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "mine")]) == 0
    importlib.import_module("trackio").finish()
    assert storage.get_runs("tests") == ["mine"]
    logs = storage.get_logs("tests", "mine")
    assert [len([log for log in logs if name in log]) for name in ("train/prior/nll", "eval/loss")] == [2, 1]


@pytest.mark.slow
def test_weights_and_biases_holds_them_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(tmp_path / "mine", report_to=["wandb"], run_name="one", max_steps=2)
    trainer.train()
    try:
        for name in FIGURES:
            assert wandb.run.summary[f"train/prior/{name}"] == pytest.approx(logged(trainer)[2][f"prior/{name}"])
        media = tmp_path / "wandb"
        (table,) = media.glob("offline-run-*/files/media/table/prior/nearest_tokens_*.json")
        found = json.loads(table.read_text())
        assert found["columns"] == tracking.HEADS and [row[0] for row in found["data"]] == [0, 1, 2, 3]
        drawn = {
            f"prior/{path.name.split('_')[0]}" for path in media.glob("offline-run-*/files/media/images/prior/*.png")
        }
        assert drawn == PICTURES
    finally:
        wandb.finish()


class Tracker(TrainerCallback):
    """Keeps what it is sent."""

    sent: tuple = ()


def train(tmp_path, monkeypatch, **settings):
    tracker = Tracker()
    monkeypatch.setitem(tracking.SENDERS, Tracker, lambda tracker, *what: setattr(tracker, "sent", what))
    trainer = make_trainer(tmp_path / "mine", max_steps=1, callbacks=[tracker], **settings)
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer, tracker.sent


@pytest.mark.slow
def test_several_prompts_have_a_table_each(tmp_path, monkeypatch):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=make_tokenizer())
    model.add_adapter("mine", PriorConfig(num_virtual_tokens=2, seed=1))
    names = ["default", "mine"]  # and the folder of the default prompt is named mine too
    monkeypatch.setattr(test_trainer, "PriorTrainer", partial(PriorTrainer, adapter_names=names))
    _, (tables, pictures, _) = train(tmp_path, monkeypatch, model=model)
    assert {name: len(rows) for name, rows in tables.items()} == {f"{TABLE}/default": 4, f"{TABLE}/mine": 2}
    assert set(pictures) == PICTURES


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, (tables, pictures, step) = train(tmp_path, monkeypatch)
    assert list(tables) == [TABLE] and len(tables[TABLE]) == 4 and pictures == {} and step == 1
    assert "Trackers got no pictures of the prompt: a picture needs matplotlib" in caplog.text


def test_a_prompt_that_cannot_be_looked_at_is_trained_all_the_same(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("priors_peft.analysis.collect.analyze", full)
    trainer, sent = train(tmp_path, monkeypatch)
    assert sent == () and "Trackers got no tables and pictures of the prompt: OSError" in caplog.text
    trainer.save_model()
    assert (tmp_path / "mine" / "adapter_model.safetensors").is_file()
