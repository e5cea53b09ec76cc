"""The objective, its scaling, and that nothing is lost when training is stopped."""

import copy
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, WIDTH, addition_rows, make_model, make_tokenizer
from datasets import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from priors_peft import PriorConfig, PriorPeftModel, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.analysis.geometry import effective_rank, mean_pairwise_cosine
from priors_peft.checkpoints import last_checkpoint, weight_of
from priors_peft.data import IGNORED, tokenize
from priors_peft.evaluation import answer, answer_metrics
from priors_peft.tasks.metrics import exact_match


def make_trainer(tmp_path, rows=16, config=None, model=None, callbacks=None, compute_metrics=None, **settings):
    model = model or get_prior_model(
        make_model(), PriorConfig(**{"num_virtual_tokens": 4} | (config or {})), tokenizer=make_tokenizer()
    )
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return PriorTrainer(
        model=model,
        args=PriorTrainingArguments(**defaults | settings),
        train_dataset=addition_rows(rows),
        eval_dataset=addition_rows(6, start=400),
        processing_class=make_tokenizer(),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def coordinate(trainer):
    return trainer.model.prompt_encoder["default"].coordinate.detach().clone()


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step before it is clipped."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(model.prompt_encoder["default"].coordinate.grad.clone())


@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
def test_the_gradient_is_the_objectives_for_any_accumulation(tmp_path, prior_weight):
    seen = {}
    for steps in (1, 2, 4):
        gradients = Gradients()
        trainer = make_trainer(
            tmp_path,
            config={"prior_weight": prior_weight, "num_virtual_tokens": 4},
            callbacks=[gradients],
            max_steps=1,
            per_device_train_batch_size=16 // steps,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
        )
        trainer.train()
        seen[steps] = gradients.seen[0]
    model = get_prior_model(
        make_model(), PriorConfig(num_virtual_tokens=4, prior_weight=prior_weight), tokenizer=make_tokenizer()
    )
    encoder = model.prompt_encoder["default"]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16)])
    tokens = (batch["labels"] != IGNORED).sum()
    assert tokens == trainer.num_supervised_tokens
    objective = model(**batch).loss - prior_weight / tokens * encoder.log_prob(encoder())
    objective.backward()
    for gradient in seen.values():
        assert (gradient - encoder.coordinate.grad).norm() < 1e-4 * encoder.coordinate.grad.norm()


@pytest.mark.slow
def test_weight_zero_ignores_the_prior_and_a_great_weight_leads_to_its_mode(tmp_path):
    free = make_trainer(tmp_path, config={"prior_weight": 0.0, "num_virtual_tokens": 4})
    # Plain tuning from the same start: stock Trainer on the model's own loss.
    plain = make_trainer(tmp_path, config={"prior_weight": 0.0, "num_virtual_tokens": 4})
    stock = Trainer(
        model=plain.model, args=plain.args, train_dataset=plain.train_dataset, data_collator=plain.data_collator
    )
    stock._loss_shifts_labels = False
    for trainer in (free, stock):
        torch.manual_seed(0)
        trainer.train()
    assert torch.equal(coordinate(free), coordinate(stock))
    bound = make_trainer(
        tmp_path, config={"prior_weight": 1e6, "num_virtual_tokens": 4}, max_steps=60, max_grad_norm=0.0
    )
    before = coordinate(bound).norm()
    bound.train()
    assert coordinate(bound).norm() < 0.05 * before


def test_frozen_weights_stay_bit_equal_and_the_prompt_moves(tmp_path):
    trainer = make_trainer(tmp_path)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    before = coordinate(trainer)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())
    assert not torch.equal(before, coordinate(trainer))


def test_logs_carry_the_priors_figures(tmp_path):
    trainer = make_trainer(tmp_path, config={"prior_weight": 0.5, "num_virtual_tokens": 4}, learning_rate=1e-6)
    trainer.train()
    entry = trainer.state.log_history[0]
    model = trainer.model.eval()
    encoder = model.prompt_encoder["default"]
    prompt = encoder().detach()
    penalty = -0.5 / trainer.num_supervised_tokens * entry["prior/log_prob"]
    assert entry["loss"] == pytest.approx(entry["prior/nll"] + penalty, rel=1e-4)
    assert entry["prior/log_prob"] == pytest.approx(encoder.log_prob(prompt).item(), rel=1e-3)
    assert entry["prior/weight"] == 0.5
    assert entry["prior/effective_rank"] == pytest.approx(effective_rank(prompt).item(), rel=1e-3)
    assert entry["prior/mean_pairwise_cosine"] == pytest.approx(mean_pairwise_cosine(prompt).item(), abs=1e-3)
    assert 0 < entry["prior/drift"] < 1e-3
    assert all("prior/drift" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_training_again_logs_its_own_steps(tmp_path):
    settings = {"learning_rate": 1e-9, "max_steps": 5, "logging_steps": 3}
    trainer = make_trainer(tmp_path, config={"inference": "map"}, **settings)
    logged = []
    for _ in range(2):
        trainer.train()
        logged.append([entry["prior/nll"] for entry in trainer.state.log_history if "loss" in entry])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_arguments_serve_several_trainers(tmp_path):
    args = PriorTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for architecture, strategy in (("bloom", "group_by_length"), ("llama", "random")):
        for coordinates in ("plain", "whitened"):
            config = PriorConfig(num_virtual_tokens=4, coordinates=coordinates)
            model = get_prior_model(make_model(architecture), config, tokenizer=make_tokenizer())
            trainer = PriorTrainer(model=model, args=args, processing_class=make_tokenizer())
            assert (trainer.args.learning_rate == 0.3) == (coordinates == "whitened")
            assert trainer.args.train_sampling_strategy == strategy


def test_evaluation_is_exact_and_generates(tmp_path):
    tokenizer = make_tokenizer()
    metrics = answer_metrics(tokenizer, lambda answers, truth: {"exact_match": exact_match(answers, truth)})
    settings = {"per_device_eval_batch_size": 4, "max_new_tokens": 3, "posterior_draws": 1}
    trainer = make_trainer(tmp_path, compute_metrics=metrics, **settings)
    figures = trainer.evaluate()
    by_hand = answer(trainer.model, tokenizer, addition_rows(6, start=400), max_new_tokens=3, batch_size=1)
    assert figures["eval_loss"] == pytest.approx(by_hand.nll, rel=1e-5)
    assert figures["eval_exact_match"] == exact_match(by_hand.predictions, by_hand.references)
    assert trainer.evaluate(addition_rows(6, start=400))["eval_loss"] == figures["eval_loss"]
    generated = trainer.predict(addition_rows(6, start=400)).predictions
    assert tokenizer.batch_decode(generated.clip(0), skip_special_tokens=True) == by_hand.predictions


def test_rows_are_evaluated_by_length_and_come_back_in_order(tmp_path, monkeypatch):
    rows = [{"prompt": "1 " * length + "plus", "completion": f" {length}"} for length in (2, 9, 4, 7, 1)]
    tokenizer, seen, widths = make_tokenizer(), [], []
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=2, compute_metrics=None, max_new_tokens=2)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
    generate = trainer.model.generate
    monkeypatch.setattr(
        trainer.model, "generate", lambda **given: widths.append(given["input_ids"].shape[1]) or generate(**given)
    )
    output = trainer.predict(rows)
    assert widths == [10, 5, 2]
    alone = answer(trainer.model, tokenizer, rows, max_new_tokens=2, batch_size=1)
    for predictions, labels in ((output.predictions, output.label_ids), (seen[0].predictions, seen[0].label_ids)):
        assert tokenizer.batch_decode(predictions.clip(0), skip_special_tokens=True) == alone.predictions
        assert tokenizer.batch_decode(labels.clip(0), skip_special_tokens=True) == alone.references


def test_rows_are_evaluated_alike_however_they_come(tmp_path):
    rows = [{"prompt": "1 " * length + "plus", "completion": f" {length}"} for length in (2, 9, 4, 7, 1)]
    settings = {"per_device_eval_batch_size": 2, "max_new_tokens": 2, "compute_metrics": lambda prediction: {}}
    trainer = make_trainer(tmp_path, **settings)
    expected, dataset = trainer.predict(rows), Dataset.from_list(rows)
    tokenized = tokenize(rows, make_tokenizer())
    for same in (dataset, dataset.to_iterable_dataset(), tokenized, tokenized.with_format("torch")):
        output = trainer.predict(same)
        assert output.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-6)
        assert output.predictions.tolist() == expected.predictions.tolist()
        assert output.label_ids.tolist() == expected.label_ids.tolist()
    with pytest.raises(ValueError, match="dataset must be a datasets.Dataset or a list of rows, got Subset"):
        trainer.predict(torch.utils.data.Subset(rows, [0]))
    # What is dropped is the shortest row.
    some = make_trainer(tmp_path, dataloader_drop_last=True, **settings).predict(rows)
    assert some.label_ids.tolist() == expected.label_ids[:4].tolist()
    assert some.predictions.tolist() == expected.predictions[:4].tolist()


def test_training_on_tensors_or_a_stream_is_training_on_their_rows(tmp_path):
    tokenizer, found = make_tokenizer(), []
    rows = tokenize(addition_rows(16), tokenizer)

    def train(dataset, **settings):
        config = PriorConfig(num_virtual_tokens=4, prior_weight=0.0) if not settings else PriorConfig(**settings)
        model = get_prior_model(make_model(), config, tokenizer=tokenizer)
        args = make_trainer(tmp_path, model=model, train_sampling_strategy="sequential").args
        trainer = PriorTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        return coordinate(trainer)

    for dataset in (rows, rows.with_format("torch"), rows.to_iterable_dataset()):
        found.append(train(dataset))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match="prior_weight must be 0 for a streamed train_dataset, got 0.01"):
        train(rows.to_iterable_dataset(), num_virtual_tokens=4)


def test_rows_that_must_be_padded_are_grouped_by_length(tmp_path):
    def strategy(architecture, **settings):
        model = get_prior_model(make_model(architecture), PriorConfig(num_virtual_tokens=4))
        return make_trainer(tmp_path, model=model, **settings).args.train_sampling_strategy

    assert strategy("llama") == "random"
    assert strategy("bloom") == strategy("llama", gradient_checkpointing=True) == "group_by_length"
    assert strategy("bloom", train_sampling_strategy="random") == "random"
    orders = []
    for seed in (0, 0, 1):
        model = get_prior_model(make_model("bloom"), PriorConfig(num_virtual_tokens=4))
        trainer = make_trainer(tmp_path, model=model, rows=64, seed=seed)
        orders.append([batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


def test_early_stopping_and_the_best_model(tmp_path):
    stops = EarlyStoppingCallback(2)
    trainer = make_trainer(
        tmp_path,
        callbacks=[stops],
        max_steps=40,
        learning_rate=5.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step < 40 and min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@pytest.mark.parametrize("prior", ["structured", "own"])
def test_the_best_of_a_named_adapter_and_of_a_users_own_prior(tmp_path, prior):
    normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(WIDTH), 0.1), 1)
    config = PriorConfig(num_virtual_tokens=4, prior=normal if prior == "own" else prior, inference="map")
    model = get_prior_model(make_model(), config, tokenizer=make_tokenizer(), adapter_name="sums")
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 12}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 5.0}
    trainer = make_trainer(tmp_path, model=model, **steps, **best)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_rows_that_fill_the_context_are_cut_and_answered(tmp_path, caplog):
    tokenizer = make_tokenizer()
    long = [{"prompt": "1 2 3 4 5 " * 40 + "6", "completion": " 7"}]
    metrics = answer_metrics(tokenizer, lambda answers, truth: {"exact_match": exact_match(answers, truth)})
    model = get_prior_model(make_model("gpt2"), PriorConfig(num_virtual_tokens=4), tokenizer=tokenizer)
    trainer = make_trainer(tmp_path, model=model, compute_metrics=metrics)
    assert "longer than max_length" not in caplog.text
    trainer.evaluate(long)
    assert "1 of 1 rows are longer than max_length=124" in caplog.text
    answer(model, tokenizer, long, max_new_tokens=5)
    ids = torch.ones(1, 125, dtype=torch.long)
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match="room for the 4 virtual tokens in the model's context of 128 tokens, got 125"
        ):
            call(input_ids=ids)


def test_autocast_leaves_the_prompt_and_its_prior_in_full_precision():
    encoder = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4)).prompt_encoder["default"]
    expected = encoder(), encoder.log_prob(encoder())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prompt = encoder()
        assert torch.equal(prompt, expected[0]) and torch.equal(encoder.log_prob(prompt), expected[1])


CONTINUE = """
import sys, os, signal
sys.path.insert(0, sys.argv[1])
from conftest import make_model
from test_trainer import make_trainer
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer(sys.argv[2], rows=10, max_steps=6, save_strategy="steps", save_steps=3, callbacks=[Kill()])
trainer.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_a_killed_run_resumes_to_the_last_bit(tmp_path, tuning):
    settings = {"rows": 10, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    if tuning == "deep":
        settings["config"] = {"num_virtual_tokens": 4, "tuning": "deep"}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    if tuning == "soft":
        killed = subprocess.run(
            [sys.executable, "-c", CONTINUE, str(Path(__file__).parent), str(tmp_path / "killed")], capture_output=True
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    else:
        make_trainer(tmp_path / "killed", **settings | {"callbacks": [StopAfter(3)]}).train()
    assert Path(last_checkpoint(tmp_path / "killed")).name == "checkpoint-3"
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(coordinate(resumed), coordinate(whole))
    assert torch.equal(*(trainer.model.prompt_encoder["default"]() for trainer in (resumed, whole)))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_saved_prompt_trains_on_from_where_it_was(tmp_path):
    trainer = make_trainer(tmp_path / "first", max_steps=2)
    trainer.train()
    trainer.save_model()
    assert not list((tmp_path / "first").glob("*.bin"))
    model = PriorPeftModel.from_pretrained(make_model(), tmp_path / "first", is_trainable=True)
    again = make_trainer(tmp_path / "second", model=model)
    assert torch.equal(coordinate(again), coordinate(trainer))
    assert again.model.prompt_encoder["default"].drift(again.model.prompt_encoder["default"]()) > 0
    again.train()
    assert not torch.equal(coordinate(again), coordinate(trainer))


def test_nan_stops_training_and_keeps_the_last_checkpoint(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.base_model.get_output_embeddings().weight.data[0, 0] = float("nan")

    trainer = make_trainer(tmp_path, callbacks=[Poison()], max_steps=6, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match="became nan after step 3; .*checkpoint-3"):
        trainer.train()
    model = PriorPeftModel.from_pretrained(make_model(), tmp_path / "checkpoint-3")
    assert torch.equal(model.prompt_encoder["default"].coordinate, coordinate(trainer))


def test_an_unwritable_folder_is_found_out_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir must be writable .* nothing was trained"):
        make_trainer(tmp_path / "file" / "below")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        make_trainer(tmp_path / "full")


def test_a_run_that_is_resumed_from_its_last_step_is_not_trained_on(tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "constant"}
    (whole := make_trainer(tmp_path, **settings)).train()
    (resumed := make_trainer(tmp_path, **settings)).train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert torch.equal(coordinate(resumed), coordinate(whole))


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"
    assert last_checkpoint(tmp_path / "elsewhere") is None
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        make_trainer(tmp_path / "elsewhere").train(resume_from_checkpoint=True)


def test_a_later_run_in_one_folder_goes_on_from_its_own_checkpoints(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=2).train()
    states = [tmp_path / f"checkpoint-{step}" / "trainer_state.json" for step in (2, 4)]
    for state, seconds in zip(states, (1000, 2000), strict=True):
        os.utime(state, (seconds, seconds))
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-4"
    make_trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-3"
    for state in tmp_path.glob("*/trainer_state.json"):  # as in a copy that keeps no times
        os.utime(state, (3000, 3000))
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-4"


@pytest.mark.slow
def test_a_run_that_died_before_its_first_checkpoint_does_not_go_on_from_an_earlier_runs(tmp_path, caplog):
    class DieAfter(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **settings).train()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path, callbacks=[DieAfter()], **settings).train()
        assert last_checkpoint(tmp_path) is None
    assert "holds no checkpoint of the run that was begun last; checkpoint-" in caplog.text
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=True)
    # Whoever names one goes on from it, and then from its successors.
    make_trainer(tmp_path, max_steps=6, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-6"
    make_trainer(tmp_path, max_steps=2, **settings).train()
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-2"


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    other = make_trainer(tmp_path, config={"num_virtual_tokens": 7}, save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError, match="num_virtual_tokens must be the saved adapter's 4, got 7"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="prior must be the checkpoint's 'structured' to go on from .*got 'gaussian'"):
        make_trainer(tmp_path, config={"prior": "gaussian"}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="prior_kwargs must be the checkpoint's {} to go on .*got {'shrinkage': 0.5}"):
        make_trainer(tmp_path, config={"prior_kwargs": {"shrinkage": 0.5}}).train(resume_from_checkpoint=True)
    activations = {"reference": "activations", "reference_kwargs": {"data": addition_rows(64)}}
    with pytest.raises(ValueError, match="reference must be the checkpoint's 'vocabulary' .*got 'activations'"):
        make_trainer(tmp_path, config=activations).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_loaded_as_a_model_is_gone_on_from(tmp_path):
    config = {
        "num_virtual_tokens": 4,
        "prior_kwargs": {"shrinkage": 0.5},
        "reference": "activations",
        "reference_kwargs": {"data": addition_rows(64)},
    }
    make_trainer(tmp_path, config=config, save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    loaded = PriorPeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    trainer = make_trainer(tmp_path, model=loaded, max_steps=5)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 5


def test_labels_cover_the_completion_and_its_end_only():
    tokenizer = make_tokenizer()
    row = tokenize([{"prompt": "what is 3 plus 4 ?", "completion": " 7"}], tokenizer)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [*"what is 3 plus 4 ? 7".split(), "</s>"]
    assert row["labels"] == [IGNORED] * 6 + row["input_ids"][6:]
    alone = tokenize([{"prompt": "", "completion": " 7"}], tokenizer)[0]
    assert (
        tokenizer.convert_ids_to_tokens(alone["input_ids"]) == ["<s>", "7", "</s>"] and alone["labels"][0] == IGNORED
    )
    short = tokenize([{"prompt": "what is 3 plus 4 ?", "completion": " 7"}], tokenizer, max_length=4)[0]
    assert tokenizer.convert_ids_to_tokens(short["input_ids"]) == ["4", "?", "7", "</s>"]


def test_plain_text_that_is_cut_keeps_its_start_and_loses_its_end():
    tokenizer = make_tokenizer()
    rows = [{"prompt": "", "completion": "3 plus 4 is 7"}, {"prompt": "what is", "completion": "3 plus 4 is 7"}]
    for length, kept in ((9, "<s> 3 plus 4 is 7 </s>"), (4, "<s> 3 plus 4"), (1, "3")):
        text, answer = tokenize(rows, tokenizer, max_length=length)
        assert tokenizer.convert_ids_to_tokens(text["input_ids"]) == kept.split()
        assert len(answer["input_ids"]) <= length


def test_learning_rate_is_in_prior_standard_deviations(tmp_path):
    assert make_trainer(tmp_path).args.learning_rate == 0.3
    plain = make_trainer(tmp_path, config={"coordinates": "plain", "num_virtual_tokens": 4})
    prior = plain.model.prompt_encoder["default"].priors[0]
    expected = 0.3 * (prior.scale_tril @ prior.scale_tril.mT).diagonal().mean().sqrt()
    assert plain.args.learning_rate == pytest.approx(expected.item(), rel=1e-4)
    deep = make_trainer(tmp_path, config={"tuning": "deep", "num_virtual_tokens": 4})
    assert deep.args.learning_rate == pytest.approx(0.3 / LAYERS**0.5)
    assert make_trainer(tmp_path, learning_rate=0.01).args.learning_rate == 0.01


@pytest.mark.parametrize(
    "name, value", [("learning_rate", 0), ("max_length", -1), ("max_new_tokens", 0), ("posterior_draws", 0)]
)
def test_numbers_that_must_be_positive_are_refused_and_not_taken_for_the_default(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name} must be > 0, got {value}: leave it out for the default"):
        PriorTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


def test_bad_arguments_are_refused(tmp_path):
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=2))
    tokenizer = make_tokenizer()
    with pytest.raises(TypeError, match="model must be a PriorPeftModel .* got LlamaForCausalLM"):
        PriorTrainer(model=make_model(), processing_class=tokenizer)
    with pytest.raises(TypeError, match="args must be PriorTrainingArguments, got TrainingArguments"):
        PriorTrainer(model=model, args=TrainingArguments(str(tmp_path)), processing_class=tokenizer)
    with pytest.raises(ValueError, match="processing_class must be the base model's tokenizer"):
        PriorTrainer(model=model)
    with pytest.raises(ValueError, match="label_smoothing_factor must be off, got 0.1"):
        make_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="neftune_noise_alpha must be off, got 5"):
        make_trainer(tmp_path, neftune_noise_alpha=5)
    with pytest.raises(ValueError, match="the columns prompt and completion, messages, or text, got \\['txt'\\]"):
        PriorTrainer(model=model, processing_class=tokenizer, train_dataset=[{"txt": "a"}])
    for value, said in (("", "must not be empty, got ''"), (float("nan"), "must be a string, got nan")):
        with pytest.raises(ValueError, match=f"row 1: 'completion' {said}"):
            rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1", "completion": value}]
            PriorTrainer(model=model, processing_class=tokenizer, train_dataset=rows)
    with pytest.raises(ValueError, match="row 1: 'prompt' must be a string, got None"):
        rows = Dataset.from_list([{"prompt": "1", "completion": "2"}, {"prompt": None, "completion": "2"}])
        PriorTrainer(model=model, processing_class=tokenizer, train_dataset=rows)
    for rows, message in (([], "must hold at least one row"), (["a"], "must be .* a list of rows .*, got str in it")):
        with pytest.raises(ValueError, match=message):
            PriorTrainer(model=model, processing_class=tokenizer, train_dataset=rows)
    with pytest.raises(ValueError, match="task_type must be .CAUSAL_LM., got 'SEQ_CLS'"):
        get_prior_model(make_model(), PriorConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    rows = [{"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}]
    with pytest.raises(ValueError, match="train_dataset must have supervised tokens"):
        PriorTrainer(model=model, processing_class=tokenizer, train_dataset=copy.deepcopy(rows))


def test_a_checkpoint_tells_the_weight_of_each_of_its_prompts(tmp_path):
    for name, weight in (("default", 0.3), ("other", 0.03)):
        folder = tmp_path if name == "default" else tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "prior_config.json").write_text(json.dumps({"config": {"prior_weight": weight}}))
        assert weight_of(tmp_path, name) == weight
    assert weight_of(tmp_path, "absent") is None


def test_transformers_own_trainer_is_told_that_it_leaves_the_prior_out(tmp_path, caplog):
    logging.Logger.warning_once.cache_clear()
    ours = make_trainer(tmp_path, max_steps=1)
    ours.train()
    assert "without its prior" not in caplog.text
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    rows = {"train_dataset": ours.train_dataset, "data_collator": ours.data_collator}
    Trainer(ours.model, TrainingArguments(**settings), **rows).train()
    assert caplog.text.count("trains without its prior: use priors_peft.PriorTrainer") == 1


def test_geometry_of_known_prompts():
    unit = torch.eye(4, WIDTH)
    assert effective_rank(unit) == pytest.approx(4, rel=1e-5)
    assert effective_rank(unit[:1].expand(4, -1)) == pytest.approx(1, rel=1e-5)
    assert mean_pairwise_cosine(unit) == pytest.approx(0, abs=1e-6)
    assert mean_pairwise_cosine(unit[:1].expand(4, -1)) == pytest.approx(1, rel=1e-5)
    assert mean_pairwise_cosine(torch.stack([unit[0], -unit[0]])) == pytest.approx(-1, rel=1e-5)
