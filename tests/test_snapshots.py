"""Snapshots of training: few, evenly spaced, exact, and not lost when training is cut."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file
from test_several_prompts import CONFIGS, prompts, train
from test_trainer import StopAfter, make_trainer
from transformers import Trainer

from priors_peft import PriorCallback, PriorConfig, get_prior_model
from priors_peft.snapshots import LEAST, MOST, SNAPSHOTS, Snapshots, read_snapshots


def test_they_are_few_evenly_spaced_and_depend_on_the_step_alone():
    prompt = torch.zeros(1, 2, 3)
    snapshots = Snapshots(prompt)
    for step in range(1000):
        if snapshots.is_due(step):
            snapshots.take(step, prompt + step)
        steps = sorted(snapshots.prompts)
        gaps = {later - earlier for earlier, later in zip(steps, steps[1:], strict=False)}
        assert steps[0] == 0 and len(steps) < MOST and len(gaps) <= 1
        assert len(steps) >= min(step, (MOST - 1) // 2)
    assert all(torch.equal(one, prompt + step) for step, one in snapshots.prompts.items())
    late = Snapshots(prompt)
    assert [step for step in range(900, 1100) if late.is_due(step)] == [928, 960, 1024, 1088]


def test_a_large_prompt_is_kept_less_often():
    large = Snapshots(torch.empty(32, 20, 4096, device="meta"))
    assert LEAST <= 1 + large._most < MOST
    assert large._most * 4 * 32 * 20 * 4096 <= 2**26


@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_training_leaves_its_course_beside_the_adapter(tmp_path, tuning):
    config = {"tuning": tuning, "inference": "map"}
    trainer = make_trainer(tmp_path, config=config, max_steps=7)
    trainer.train()
    trainer.save_model()
    steps, course = read_snapshots(tmp_path / SNAPSHOTS)
    encoder = trainer.model.prompt_encoder["default"]
    assert steps == list(range(8)) and course.dtype == torch.float32
    assert torch.allclose(course[0], encoder.initial_prompt, atol=1e-6)
    assert torch.equal(course[-1], load_file(tmp_path / "prior.safetensors")["prompt"])
    drifts = [trainer.state.log_history[step - 1]["prior/drift"] for step in steps[1:]]
    assert [encoder.drift(one).item() for one in course[1:]] == pytest.approx(drifts, rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_leaves_the_same_file(tmp_path):
    settings = {"rows": 10, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path / "whole", **settings).train()
    # Killed after the checkpoint: what is there then is what the checkpoint left.
    make_trainer(tmp_path / "cut", **settings | {"callbacks": [StopAfter(4)]}).train()
    assert read_snapshots(tmp_path / "cut" / SNAPSHOTS)[0] == [0, 1, 2, 3, 4]
    make_trainer(tmp_path / "cut", **settings).train(resume_from_checkpoint=True)
    whole, cut = ((tmp_path / name / SNAPSHOTS).read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_a_damaged_file_does_not_stop_a_resumed_run(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=2, **settings).train()
    (tmp_path / SNAPSHOTS).write_bytes(b"cut")
    make_trainer(tmp_path, max_steps=4, **settings).train(resume_from_checkpoint=True)
    assert "Snapshots of before are lost" in caplog.text
    assert read_snapshots(tmp_path / SNAPSHOTS)[0] == [2, 3, 4]


def test_the_best_model_is_among_them(tmp_path):
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 12}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 5.0}
    trainer = make_trainer(tmp_path, config={"inference": "map"}, **steps, **best)
    trainer.train()
    kept, course = read_snapshots(tmp_path / SNAPSHOTS)
    prompt = trainer.model.prompt_encoder["default"]()
    assert trainer.state.best_global_step < 12
    assert torch.equal(course[kept.index(trainer.state.best_global_step)], prompt)
    assert kept[-1] == 12 and not torch.equal(course[-1], prompt)


def test_several_prompts_have_a_file_each(tmp_path):
    names = list(CONFIGS)
    trainer = train(tmp_path, names)
    trainer.save_model()
    for name in names:
        steps, course = read_snapshots(tmp_path / name / SNAPSHOTS)
        # The prompt that stands for a mixture may be of another Gaussian than the one that was followed.
        assert steps == list(range(7)) or (name == "mixture" and steps == [0, 6])
        assert torch.equal(course[-1], prompts(trainer)[name])
        assert (tmp_path / name / "prior.safetensors").is_file()
    assert not (tmp_path / SNAPSHOTS).exists()


def test_a_full_disk_loses_snapshots_but_not_the_training(tmp_path, monkeypatch, caplog):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Snapshots, "save", full)
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 4 and "could not be written" in caplog.text


@pytest.mark.slow
def test_trials_of_prior_weights_leave_none_and_are_not_made_again(tmp_path, caplog):
    settings = {"config": {"num_virtual_tokens": 4, "prior_weight": "auto"}, "save_strategy": "steps", "save_steps": 3}
    first = make_trainer(tmp_path, max_steps=3, **settings)
    first.train()
    before = read_snapshots(tmp_path / SNAPSHOTS)[1]
    again = make_trainer(tmp_path, max_steps=6, **settings)
    again.train(resume_from_checkpoint=True)
    assert caplog.text.count("was chosen by held-out") == caplog.text.count("was not chosen again") == 1
    assert again.model.active_peft_config.prior_weight == first.model.active_peft_config.prior_weight
    steps, course = read_snapshots(tmp_path / SNAPSHOTS)
    assert steps == list(range(7)) and torch.equal(course[:4], before)


def test_a_stock_trainer_keeps_them_too(tmp_path):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4), tokenizer=make_tokenizer())
    ours = make_trainer(tmp_path, model=model)
    stock = Trainer(
        model=model,
        args=ours.args,
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
        callbacks=[PriorCallback()],
    )
    stock._loss_shifts_labels = False
    stock.train()
    assert read_snapshots(tmp_path / SNAPSHOTS)[0] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("content", [b"", b"no tensors at all"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / SNAPSHOTS).write_bytes(content)
    with pytest.raises(ValueError, match=f"{SNAPSHOTS} must be a whole safetensors file"):
        read_snapshots(tmp_path / SNAPSHOTS)
