"""The one prompt that stands for a posterior."""

import pytest
import torch
from conftest import make_model
from peft import PeftModel
from test_predictive import SETTINGS, batch_of, spread_model, trained
from test_trainer import make_trainer

from priors_peft import PriorConfig, PriorPeftModel
from priors_peft.data import IGNORED, model_inputs
from priors_peft.inference import point
from priors_peft.inference.point import choose_point


def chosen(folder, scale):
    model = spread_model(scale=scale)
    trainer = make_trainer(folder, model=model)
    choose_point(trainer, "default")
    return trainer, model.prompt_encoder["default"]


def log_probs(trainer, prompts):
    """Of the vocabulary where answers of the training rows stand, after each of the prompts `[n, S, P, d]`."""
    model = trainer.model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator([model_inputs(row) for row in trainer.train_dataset]))
    labels, encoder, found = batch.pop("labels"), model.prompt_encoder["default"], []
    before, answers = encoder.point, labels[:, 1:] != IGNORED
    for prompt in prompts:
        encoder.point = torch.stack(
            [prior.to_whitened(one) for prior, one in zip(encoder.priors, prompt, strict=True)]
        )
        logits = model(**batch).logits[:, -labels.shape[1] : -1]
        found.append(logits[answers].log_softmax(-1))
    encoder.point = before
    return torch.stack(found)


def gaps(trainer, candidates):
    """KL(average of the draws ‖ each candidate's) over all answers, in nats."""
    draws = trainer.model.posterior_samples(trainer.args.posterior_draws)
    found = log_probs(trainer, [*candidates, *draws])
    average = torch.distributions.Categorical(found[len(candidates) :].exp().mean(0))
    candidates = [torch.distributions.Categorical(logits=one) for one in found[: len(candidates)]]
    return torch.stack([torch.distributions.kl_divergence(average, one) for one in candidates]).sum(1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_of_the_mean_and_the_draws_it_predicts_most_as_the_draws_average(tmp_path, scale):
    trainer, encoder = chosen(tmp_path, scale)
    candidates = [encoder.mean(), *trainer.model.posterior_samples(trainer.args.posterior_draws)]
    best = int(gaps(trainer, candidates).argmin())
    assert torch.allclose(encoder(), candidates[best], atol=1e-5)
    assert (encoder.point is None) == (best == 0)


@torch.no_grad()
def test_after_training_it_goes_on_towards_their_average(tmp_path):
    trainer, encoder = chosen(tmp_path, 3.0)
    start = encoder()
    trainer.state.global_step = 60
    choose_point(trainer, "default")
    before, after = gaps(trainer, [start, encoder()])[:2]
    assert after < 0.8 * before
    assert not encoder.point.requires_grad and encoder.coordinate.grad is None


@torch.no_grad()
def test_steps_that_lead_away_from_their_average_are_taken_back(tmp_path, monkeypatch):
    trainer, encoder = chosen(tmp_path, 3.0)
    start = encoder()
    trainer.state.global_step = 60
    monkeypatch.setattr(point, "RATE", 100.0)
    choose_point(trainer, "default")
    assert torch.equal(encoder(), start)


def test_a_posterior_of_no_width_keeps_its_mean(tmp_path):
    trainer, encoder = chosen(tmp_path, 1e-12)
    assert torch.allclose(encoder(), encoder.mean(), atol=1e-6)


def test_a_single_draw_leaves_the_mean(tmp_path):
    trainer = make_trainer(tmp_path, model=spread_model(scale=3.0), posterior_draws=1)
    choose_point(trainer, "default")
    assert trainer.model.prompt_encoder["default"].point is None


def away_from_the_mean(folder):
    trainer = trained(folder, "variational")
    encoder = trainer.model.prompt_encoder["default"]
    encoder.point = trainer.model.prompt_encoder["default"].posterior.sample(encoder.coordinate, 1)[0].detach()
    trainer.save_model()
    return trainer.model.eval()


def test_stock_peft_answers_as_it_does_and_a_folder_keeps_mean_and_posterior_too(tmp_path):
    model, batch = away_from_the_mean(tmp_path), batch_of(spread_model())
    loaded, stock = (kind.from_pretrained(make_model(), str(tmp_path)).eval() for kind in (PriorPeftModel, PeftModel))
    del batch["labels"]
    with torch.no_grad():
        logits = [one(**batch).logits[:, -1] for one in (model, loaded, stock)]
    assert torch.equal(logits[0], logits[1]) and torch.allclose(logits[0], logits[2], atol=1e-4)
    encoder = loaded.prompt_encoder["default"]
    assert not torch.allclose(encoder(), encoder.mean())
    assert torch.equal(encoder.mean(), model.prompt_encoder["default"].mean())
    assert torch.equal(loaded.posterior_samples(3), model.posterior_samples(3))


def test_another_algorithm_begins_at_it(tmp_path):
    model = away_from_the_mean(tmp_path)
    config = PriorConfig(num_virtual_tokens=4, inference="map")
    begun = PriorPeftModel.from_pretrained(make_model(), str(tmp_path), config=config).prompt_encoder["default"]
    assert begun.posterior is None and torch.equal(begun.coordinate, model.prompt_encoder["default"].point)


def test_training_lets_go_of_it(tmp_path):
    away_from_the_mean(tmp_path)
    model = PriorPeftModel.from_pretrained(make_model(), str(tmp_path), is_trainable=True)
    encoder = model.prompt_encoder["default"]
    batch = batch_of(model)
    with torch.no_grad():
        model.train()(**batch)
    assert encoder.point is not None
    model.train()(**batch).loss.backward()
    assert encoder.point is None and encoder.coordinate.grad.any()


@pytest.mark.parametrize("inference", [name for name in SETTINGS if name != "map"])
def test_training_ends_with_it(tmp_path, inference):
    trainer = trained(tmp_path, inference, max_steps=4)
    encoder = trainer.model.prompt_encoder["default"]
    found = encoder.point
    encoder.point = torch.full_like(encoder.coordinate, torch.nan)
    choose_point(trainer, "default")
    assert (found is None and encoder.point is None) or torch.equal(found, encoder.point)


def test_a_scale_found_by_evidence_leaves_it_where_it_is(tmp_path):
    encoder = away_from_the_mean(tmp_path).prompt_encoder["default"]
    before = encoder().detach()
    encoder.rescale(torch.full((1,), 0.5))
    assert torch.allclose(encoder(), before, atol=1e-5)
