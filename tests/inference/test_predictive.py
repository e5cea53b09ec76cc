"""The posterior in training, in a folder, and in what is predicted from it."""

import math
from pathlib import Path

import pytest
import torch
from conftest import LAYERS, VOCABULARY, WIDTH, addition_rows, make_model, make_tokenizer
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer import coordinate, make_trainer
from transformers import TrainerCallback

from priors_peft import (
    PriorConfig,
    PriorPeftModel,
    PriorTrainer,
    PriorTrainingArguments,
    get_prior_model,
)
from priors_peft.data import IGNORED, pad, tokenize
from priors_peft.inference.posterior import SCALE_RATE, GaussianPosterior, SampledPosterior
from priors_peft.inference.predictive import predict
from priors_peft.inference.variational import divergence
from priors_peft.snapshots import read_snapshots


SETTINGS = {
    "map": {},
    "variational": {},
    "mixture": {"components": 3},
    "laplace": {"num_draws": 6},
    "sghmc": {"num_samples": 4, "cycles": 1},
    "svgd": {"num_particles": 3},
}


def named(inference):
    return "variational" if inference == "mixture" else inference


def trained(folder, inference, resume=None, **settings):
    config = {
        "inference": named(inference),
        "inference_kwargs": SETTINGS[inference],
        "prior_weight": 0.1,
        "num_virtual_tokens": 4,
    }
    torch.manual_seed(0)
    trainer = make_trainer(folder, config=config, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def spread_model(architecture="llama", scale=0.5, **config):
    model = get_prior_model(
        make_model(architecture), PriorConfig(num_virtual_tokens=4, **config), tokenizer=make_tokenizer()
    )
    encoder = model.prompt_encoder["default"]
    encoder.posterior = GaussianPosterior.of_scale(torch.full(encoder.coordinate.shape, scale))
    return model.eval()


def batch_of(model, rows=3):
    encoded = list(tokenize(addition_rows(rows), make_tokenizer(), None))
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {name: pad([row[name] for row in encoded], fill, "right") for name, fill in fills.items()}


@pytest.mark.parametrize("inference", list(SETTINGS))
def test_the_same_seed_gives_the_same_posterior_and_a_folder_keeps_it(tmp_path, inference):
    trainers = [trained(tmp_path / str(run), inference) for run in range(2)]
    draws = [trainer.model.posterior_samples(3, seed=1) for trainer in trainers]
    assert torch.equal(*draws)
    trainers[0].save_model()
    loaded = PriorPeftModel.from_pretrained(make_model(), str(tmp_path / "0"))
    assert torch.equal(loaded.posterior_samples(3, seed=1), draws[0])
    assert loaded.active_peft_config.inference == named(inference) and list(loaded.peft_config) == ["default"]
    stock = PeftModel.from_pretrained(make_model(), str(tmp_path / "0"))
    assert torch.allclose(stock.prompt_encoder["default"].embedding.weight, loaded.prompt("default").theta[0])


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["variational", "mixture", "sghmc", "svgd"])
def test_resumed_training_ends_with_the_same_posterior(tmp_path, inference):
    whole = trained(tmp_path / "whole", inference, max_steps=8)
    trained(tmp_path / "cut", inference, max_steps=8, save_strategy="steps", save_steps=5)
    (cut,) = (tmp_path / "cut").glob("checkpoint-5")
    resumed = trained(tmp_path / "cut", inference, resume=str(cut), max_steps=8)
    assert torch.equal(coordinate(whole), coordinate(resumed))
    assert torch.equal(whole.model.posterior_samples(4), resumed.model.posterior_samples(4))


@pytest.mark.parametrize("inference", ["sghmc", "svgd"])
def test_training_again_starts_anew_from_where_it_ended(tmp_path, inference):
    trainer = trained(tmp_path, inference, max_steps=8)
    before = trainer.model.posterior_samples(9).unique(dim=0)
    trainer.train()
    after = trainer.model.posterior_samples(9).unique(dim=0)
    assert after.isfinite().all() and len(after) == len(before) == {"sghmc": 4, "svgd": 3}[inference]
    trainer.save_model()
    model = PriorPeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=True)
    again, mean = make_trainer(tmp_path, model=model), model.prompt_encoder["default"].mean()
    again._begin()
    starts = torch.stack([model.prompt(name).theta for name in again.adapter_names]).unique(dim=0)
    # Particles go on from where they were, a chain from the mean of its draws.
    assert torch.allclose(starts, after if inference == "svgd" else mean[None], atol=1e-6)
    assert model.prompt_encoder["default"].posterior is None


@pytest.mark.parametrize("config", [{}, {"prior_kwargs": {"scale": "evidence"}}], ids=["fixed", "evidence"])
def test_the_best_state_comes_back_with_its_own_posterior(tmp_path, config):
    # A learning rate that ruins what the first steps found.
    trainer = make_trainer(
        tmp_path,
        config={"inference": "variational", "prior_weight": 0.1} | config,
        load_best_model_at_end=True,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        max_steps=8,
        learning_rate=30.0,
        max_grad_norm=0.0,
        seed=0,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-8"
    encoder, saved = trainer.model.prompt_encoder["default"], load_file(best / "prior.safetensors")
    if config:  # afterwards the prior is as wide as that state's evidence has it
        spread = saved["coordinate"].square() + (2 * SCALE_RATE * saved["posterior.rho"]).exp()
        saved["coordinate"] /= spread.mean().sqrt()
        saved["posterior.rho"] -= spread.mean().log() / (2 * SCALE_RATE)
    assert torch.allclose(encoder.coordinate, saved["coordinate"])
    assert torch.allclose(encoder.posterior.rho, saved["posterior.rho"], atol=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-4)


@pytest.mark.parametrize("inference", ["variational", "sghmc"])
def test_another_algorithm_takes_up_an_adapter_without_its_posterior(tmp_path, inference):
    trained(tmp_path / "first", inference).save_model()
    for other in ("map", "variational"):
        config = PriorConfig(num_virtual_tokens=4, inference=other, prior_weight=0.1)
        model = PriorPeftModel.from_pretrained(make_model(), str(tmp_path / "first"), config=config, is_trainable=True)
        make_trainer(tmp_path / other, model=model, max_steps=1).train()
        assert model.prompt_encoder["default"].is_variational == (other == "variational")
        assert (model.prompt_encoder["default"].posterior is None) == (other == "map")


def test_a_variational_step_minimizes_the_bound(tmp_path):
    trainer = trained(tmp_path, "variational", max_steps=1, learning_rate=1e-9)
    model = trainer.model.train()
    batch = batch_of(model)
    torch.manual_seed(3)
    outputs = model(**batch)
    torch.manual_seed(3)
    (prompt,), log_prior = model.prompt_encoder["default"](drawn=True)
    assert torch.allclose(outputs.log_prior, log_prior) and log_prior < 0
    model.eval().prompt_encoder["default"].set_prompt(prompt)
    assert model(**batch).loss.item() == pytest.approx(outputs.loss.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_gaussians_of_a_mixture_share_the_rows_of_a_step(tmp_path, tuning, rows):
    config = {"inference": "variational", "inference_kwargs": SETTINGS["mixture"], "tuning": tuning}
    trainer = make_trainer(tmp_path, config=config)
    model = trainer.model.train()
    encoder, batch = model.prompt_encoder["default"], batch_of(model, rows)
    seen = set()
    for seed in range(12):
        encoder.noise = torch.Generator().manual_seed(seed)
        outputs = model(**batch)
        outputs.loss.backward()
        trained_by = encoder.coordinate.grad.abs().sum() > 0, *(encoder.posterior.means.grad.abs().sum((1, 2, 3)) > 0)
        seen.add(tuple(map(bool, trained_by)))
        model.zero_grad()
        encoder.noise = torch.Generator().manual_seed(seed)
        thetas, log_prior = encoder(drawn=True)
        assert torch.equal(outputs.log_prior, log_prior)
        # Each row's likelihood is that under the draw of one of them, which get as many rows as the others or one less.
        with torch.no_grad():
            point = encoder.coordinate.clone()
            alone = []
            for theta in thetas:
                encoder.set_prompt(theta)
                alone.append(model.eval()(**batch).row_nll)
            encoder.coordinate.copy_(point)
            model.train()
        near = (torch.stack(alone) - outputs.row_nll).abs()
        assert near.min(0).values.max() < 1e-4
        counts = torch.bincount(near.argmin(0), minlength=3)
        assert counts.max() - counts.min() <= 1
    assert {sum(of) for of in seen} == {min(3, rows)} and all(map(any, zip(*seen, strict=True)))


@pytest.mark.parametrize(
    ("rows", "settings", "count"),
    [
        (32, {"max_steps": 120}, 4),
        (16, {"max_steps": 120}, 8),
        (8, {"max_steps": 999}, 8),
        (4, {"max_steps": 20}, 2),  # a batch has no more rows than there are
        (128, {"max_steps": 120}, 1),
        (128, {"max_steps": 300}, 2),
        (128, {"max_steps": 150, "gradient_accumulation_steps": 2}, 2),
        (1024, {"max_steps": 120}, 1),
        (32, {"max_steps": -1}, 1),
        (32, {"max_steps": -1, "num_train_epochs": 32}, 4),
        (16, {"max_steps": 999, "per_device_train_batch_size": 2}, 2),  # each has a row a step
        (16, {"max_steps": 999, "posterior_draws": 1}, 1),
    ],
)
def test_a_posterior_has_as_many_gaussians_as_see_each_row_eight_times(tmp_path, rows, settings, count):
    settings = {"per_device_train_batch_size": 8} | settings
    trainer = make_trainer(tmp_path, rows=rows, config={"inference": "variational"}, **settings)
    encoder = trainer.model.prompt_encoder["default"]
    parts = encoder.posterior.parts(encoder.coordinate)
    assert len(parts) == count
    starts = torch.stack([mean for mean, _ in parts])
    assert count == 1 or torch.pdist(starts.flatten(1)).min() > 1  # draws of the prior of their own


def test_the_gaussians_of_a_prompt_that_was_trained_begin_where_it_is(tmp_path):
    trained(tmp_path / "point", "map").save_model()
    config = PriorConfig(
        num_virtual_tokens=4, inference="variational", prior_weight=0.1, inference_kwargs={"components": 3}
    )
    model = PriorPeftModel.from_pretrained(make_model(), str(tmp_path / "point"), config=config, is_trainable=True)
    trainer = make_trainer(tmp_path, model=model)
    encoder = model.prompt_encoder["default"]
    assert torch.allclose(encoder.posterior.means, encoder.coordinate.expand(2, -1, -1, -1), atol=1e-5)
    trainer.train()  # their noise is their own
    assert torch.pdist(torch.stack([encoder.coordinate, *encoder.posterior.means]).flatten(1)).min() > 1e-2


def test_a_trained_mixture_goes_on_with_its_gaussians(tmp_path):
    trained(tmp_path, "mixture").save_model()
    model = PriorPeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=True)
    before = {name: value.clone() for name, value in model.prompt_encoder.state_dict().items()}
    trainer = make_trainer(tmp_path / "again", model=model, max_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.prompt_encoder.state_dict().items())
    trainer.train()
    after = model.prompt_encoder["default"].posterior.state_dict()
    assert all(not torch.equal(after[key], before[f"default.posterior.{key}"]) for key in after if after[key].numel())


TEXT = {"prior": "text", "prior_kwargs": {"text": "what is 3 plus 4 ?"}}


@pytest.mark.parametrize(
    "config", [{"tuning": "deep"}, TEXT, TEXT | {"tuning": "deep"}], ids=["deep", "text", "deep text"]
)
def test_a_scheduled_weight_warms_the_divergence_up_for_every_tuning_and_a_described_prior(tmp_path, config):
    config = {"inference": "variational", "prior_weight": 0.5} | config
    trainer = make_trainer(tmp_path, config=config, prior_weight_schedule="linear", learning_rate=1e-9)
    trainer.train()
    encoder = trainer.model.prompt_encoder["default"]
    nats = divergence(encoder, encoder.samples(1)).item() / trainer.num_supervised_tokens
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] - entry["prior/nll"] for entry in entries] == pytest.approx(
        [weight * nats for weight in (0.0, 0.25, 0.5, 0.5)], abs=2e-4 + 1e-5 * nats
    )


@pytest.mark.parametrize("config", [{"tuning": "deep"}, TEXT | {"tuning": "deep"}], ids=["deep", "text"])
def test_a_variational_posterior_of_a_deep_prompt_is_trained_in_every_layer_and_kept(tmp_path, config):
    config = {"inference": "variational", "prior_weight": 0.1} | config
    trainer = make_trainer(tmp_path, config=config, max_steps=8)
    encoder = trainer.model.prompt_encoder["default"]
    before = encoder.coordinate.detach().clone(), encoder.posterior.log_scale.detach().clone()
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    for old, new in zip(before, (encoder.coordinate, encoder.posterior.log_scale), strict=True):
        assert ((new - old).abs().amax((1, 2)) > 0.01).all()
    trainer.save_model()
    loaded = PriorPeftModel.from_pretrained(make_model(), str(tmp_path))
    assert torch.equal(loaded.posterior_samples(3), trainer.model.posterior_samples(3))
    assert loaded.posterior_samples(3).shape == (3, LAYERS, 4, WIDTH)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("config", [{}, {"tuning": "deep"}], ids=["soft", "deep"])
def test_averaged_probabilities_are_the_mean_of_each_draws(architecture, config):
    model, batch = spread_model(architecture, **config), None
    batch = batch_of(model)
    draws = model.posterior_samples(3, seed=2)
    alone = []
    mean = model.prompt_encoder["default"].coordinate.detach().clone()
    posterior, model.prompt_encoder["default"].posterior = model.prompt_encoder["default"].posterior, None
    with torch.no_grad():
        for draw in draws:
            model.prompt_encoder["default"].set_prompt(draw)
            alone.append(model(**batch).logits.log_softmax(-1))
        model.prompt_encoder["default"].coordinate.copy_(mean)
        model.prompt_encoder["default"].posterior = posterior
        expected = torch.stack(alone).exp().mean(0)
        with model.averaged(3, seed=2):
            whole, packed = model(**batch), model(**batch, return_logits=False)
    real = batch["attention_mask"].bool()
    assert torch.allclose(whole.logits.exp()[real], expected[real], atol=1e-4)
    assert whole.loss.item() == pytest.approx(packed.loss.item(), rel=1e-4)
    assert torch.allclose(whole.row_nll, packed.row_nll, rtol=1e-4)


def test_a_point_predicts_what_it_does_alone_and_one_draw_without_spread_too():
    model = spread_model(scale=1e-9)
    batch = batch_of(model)
    with torch.no_grad():
        plain = model(**batch)
        with model.averaged(1):
            narrow = model(**batch)
        model.prompt_encoder["default"].posterior = None
        with model.averaged(4):
            point = model(**batch)
    assert torch.equal(plain.logits, point.logits)
    assert torch.allclose(plain.logits, narrow.logits, atol=1e-4)
    assert torch.equal(model.posterior_samples(2), model.prompt("default").theta.expand(2, -1, -1, -1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_generation_by_averaged_probabilities_takes_the_likeliest_token_each_time(architecture):
    model = spread_model(architecture)
    ids = torch.tensor([[5, 20, 31], [6, 22, 40]])
    mask = torch.ones_like(ids)
    with torch.no_grad(), model.averaged(3, seed=4):
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=[]
        )
        text = ids
        for _ in range(4):
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(generated, text)
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_as_many_beams_as_words_find_the_likeliest_answer_of_two_tokens(architecture):
    model, ids = spread_model(architecture), torch.tensor([[5, 20, 31], [6, 22, 40]])
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": -1}  # none ends an answer
    with torch.no_grad(), model.averaged(3, seed=4):
        generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=VOCABULARY, **options)
        for row, found in zip(ids, generated, strict=True):
            first = model(input_ids=row[None]).logits[0, -1]
            pairs = torch.cat([row.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], 1)
            joint = first[:, None] + model(input_ids=pairs).logits[:, -1]
            assert found[-2:].tolist() == list(divmod(int(joint.argmax()), VOCABULARY))


def test_sampled_text_follows_the_averaged_probabilities():
    model = spread_model()
    ids = torch.tensor([[5, 20, 31]]).expand(2000, -1)
    torch.manual_seed(0)
    with torch.no_grad(), model.averaged(3, seed=4):
        drawn = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=True,
            top_k=0,
            eos_token_id=[],
        )
        expected = model(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1])).logits[0, -1].exp()
    share = torch.bincount(drawn[:, -1], minlength=len(expected)) / len(drawn)
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / len(drawn))


def test_uncertainty_splits_into_what_draws_share_and_what_they_disagree_on():
    model, rows = spread_model(scale=1.0), addition_rows(5)
    prediction = predict(model, make_tokenizer(), rows, count=6, batch_size=2)
    for entropy, expected, shared in zip(
        prediction.entropy, prediction.expected_entropy, prediction.mutual_information, strict=True
    ):
        assert shared > 0 and entropy == pytest.approx(expected + shared, rel=1e-4)
    again = predict(model, make_tokenizer(), rows, count=6, batch_size=5)
    assert again.nll == pytest.approx(prediction.nll, rel=1e-5)
    assert again.entropy == pytest.approx(prediction.entropy, rel=1e-4)
    with torch.no_grad(), model.averaged(6):
        batch = batch_of(model, 5)
        assert model(**batch).loss.item() == pytest.approx(prediction.nll, rel=1e-5)
    model.prompt_encoder["default"].posterior = None
    point = predict(model, make_tokenizer(), rows, count=6)
    assert point.mutual_information == pytest.approx([0] * 5, abs=1e-5)


def test_tokenized_rows_without_a_mask_are_predicted_as_rows_of_text():
    model, rows = spread_model(), Dataset.from_list(addition_rows(5))
    tokenized = tokenize(rows, make_tokenizer()).remove_columns("attention_mask").with_format("torch")
    assert predict(model, make_tokenizer(), tokenized, 3) == predict(model, make_tokenizer(), rows, 3)


def test_a_run_that_can_not_be_resumed_leaves_the_posterior(tmp_path):
    trainer = trained(tmp_path, "laplace", save_strategy="no")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.model.prompt_encoder["default"].posterior is not None


@pytest.mark.parametrize(
    "begun, given", [("map", "variational"), ("variational", "map"), ("svgd", "map"), ("sghmc", "laplace")]
)
def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path, begun, given):
    trained(tmp_path, begun, save_strategy="steps", save_steps=4)
    with pytest.raises(ValueError) as error:
        trained(tmp_path, given, resume=True)
    assert str(error.value).startswith(f"inference must be the checkpoint's {begun!r} to go on from ")
    assert str(error.value).endswith(f"got {given!r}: pass inference={begun!r}, or train anew in another output_dir")


def test_a_checkpoint_of_the_algorithms_other_settings_is_refused_and_of_one_that_trains_alike_taken(
    tmp_path, monkeypatch
):
    trained(tmp_path / "svgd", "svgd", save_strategy="steps", save_steps=4)
    monkeypatch.setitem(SETTINGS, "svgd", {"num_particles": 2})
    with pytest.raises(ValueError, match="inference_kwargs must be the checkpoint's {'num_particles': 3} .*got {'num"):
        trained(tmp_path / "svgd", "svgd", resume=True)
    trained(tmp_path / "map", "map", save_strategy="steps", save_steps=4)
    found = trained(tmp_path / "map", "laplace", resume=True, max_steps=5)
    assert found.model.prompt_encoder["default"].posterior is not None


def test_what_a_posterior_needs_is_said_before_training(tmp_path):
    for settings, message in (
        ({"prior_weight": 0}, "prior_weight must be a number > 0 for inference='variational', got 0"),
        ({"coordinates": "plain"}, 'coordinates must be "whitened" for inference=\'variational\', got "plain"'),
        ({"inference_kwargs": {"rank": -1}}, "rank must be an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            PriorConfig(num_virtual_tokens=4, inference="variational", **settings)
    with pytest.raises(ValueError, match="load_best_model_at_end must be False for inference='svgd'"):
        make_trainer(
            tmp_path,
            config={"inference": "svgd"},
            load_best_model_at_end=True,
            save_strategy="steps",
            eval_strategy="steps",
        )
    for count in (0, 1.5, "8"):
        with pytest.raises(ValueError, match=f"count must be an integer >= 1, got {count!r}"):
            spread_model().posterior_samples(count)
        with (
            pytest.raises(ValueError, match=f"count must be an integer >= 1, got {count!r}"),
            spread_model().averaged(count),
        ):
            pass


@pytest.mark.parametrize("inference", ["sghmc", "svgd"])
def test_draws_of_a_sampled_posterior_have_the_prompt_as_their_mean_and_nothing_else_is_left(tmp_path, inference):
    trainer = trained(tmp_path, inference, max_steps=8)
    _, course = read_snapshots(tmp_path / "snapshots.safetensors")
    assert torch.equal(course[-1], trainer.model.prompt("default").theta)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    encoder = trainer.model.prompt_encoder["default"]
    assert (
        isinstance(encoder.posterior, SampledPosterior)
        and len(encoder.posterior.draws) == {"sghmc": 4, "svgd": 3}[inference]
    )
    assert torch.allclose(encoder.posterior.draws.mean(0), encoder.coordinate)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "resumed"), [(8, 300), (300, 8)])
def test_a_resumed_run_has_the_gaussians_of_its_checkpoint(tmp_path, begun, resumed):
    settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
    config = {"inference": "variational"}
    callbacks = [StopAfter(2)]
    make_trainer(tmp_path, rows=32, config=config, max_steps=begun, callbacks=callbacks, **settings).train()
    saved = load_file(tmp_path / "checkpoint-2" / "prior.safetensors")
    assert ("posterior.means" in saved) == (begun == 300)
    trainer = make_trainer(tmp_path, rows=32, config=config, max_steps=resumed, callbacks=[StopAfter(4)], **settings)
    trainer.train(resume_from_checkpoint=True)
    state = trainer.model.prompt_encoder["default"].posterior.state_dict()
    assert {f"posterior.{key}" for key in state} == {key for key in saved if key.startswith("posterior.")}
    moved = [not torch.equal(value, saved[f"posterior.{key}"]) for key, value in state.items() if value.numel()]
    assert all(moved) and trainer.state.global_step == 4


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_mixtures_scale_is_that_of_most_evidence(tmp_path):
    config = {"inference": "variational", "inference_kwargs": {"components": 3}, "prior_kwargs": {"scale": "evidence"}}
    trainer = make_trainer(tmp_path, config=config)
    trainer.train()
    encoder = trainer.model.prompt_encoder["default"]
    moments = [mean.square() + part.variance(mean) for mean, part in encoder.posterior.parts(encoder.coordinate)]
    assert torch.stack(moments).mean().item() == pytest.approx(1.0, rel=1e-4)
    scale = (
        encoder.priors[0].scale_tril.norm()
        / make_trainer(tmp_path, config=config | {"prior_kwargs": {}})
        .model.prompt_encoder["default"]
        .priors[0]
        .scale_tril.norm()
    )
    assert scale.item() != pytest.approx(1.0, rel=1e-4)


def test_an_optimizer_of_ones_own_has_one_gaussian(tmp_path):
    def trainer(**kwargs):
        config = {"inference": "variational", "inference_kwargs": kwargs}
        model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, **config), tokenizer=make_tokenizer())
        own = torch.optim.SGD(model.prompt_encoder.parameters(), lr=0.1)
        args = PriorTrainingArguments(str(tmp_path), max_steps=99, use_cpu=True, report_to=[])
        data = {"train_dataset": addition_rows(8), "processing_class": make_tokenizer()}
        return PriorTrainer(model, args, **data, optimizers=(own, None)), own

    made, own = trainer()
    assert made.optimizer is own and isinstance(made.model.prompt_encoder["default"].posterior, GaussianPosterior)
    with pytest.raises(ValueError, match="components must be 1 with an optimizer of your own, got 3"):
        trainer(components=3)


def test_drift_and_course_are_of_the_gaussian_whose_prompt_is_kept(tmp_path):
    trainer = trained(tmp_path, "mixture", max_steps=6)
    encoder = trainer.model.prompt_encoder["default"]
    assert encoder.point is not None
    means = torch.stack([mean for mean, _ in encoder.posterior.parts(encoder.coordinate)])
    own = int((means - encoder.point).flatten(1).norm(dim=1).argmin())
    assert torch.equal(encoder.initial_prompt, encoder.starts[own])
    steps, prompts = read_snapshots(tmp_path / "snapshots.safetensors")
    assert torch.allclose(prompts[0], encoder.starts[own], atol=1e-5)
    assert torch.allclose(prompts[-1], trainer.model.prompt("default").theta, atol=1e-5)
    assert steps == ([0, 6] if own else list(range(7)))
