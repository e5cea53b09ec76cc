"""The mode is the mode: ridge regression in closed form, schedules, and a weight chosen by held-out likelihood."""

import math

import pytest
import torch
from conftest import addition_rows, make_model, make_tokenizer
from test_trainer import coordinate, make_trainer

from priors_peft import PriorConfig, PriorPromptEncoder, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.inference.map import WEIGHT_GRID, weight_factor
from priors_peft.priors import GaussianPrior, StructuredPrior


@pytest.mark.parametrize("coordinates", ["plain", "whitened"])
@pytest.mark.parametrize("weight", [1.0, 0.1])
def test_a_gaussian_prior_on_a_linear_model_gives_ridge_regression(coordinates, weight):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 6, generator=generator)
    outputs = inputs @ torch.randn(6, generator=generator) + torch.randn(30, generator=generator)
    mixing = torch.randn(6, 6, generator=generator)
    prior = StructuredPrior(
        torch.randn(6, generator=generator), torch.linalg.cholesky(mixing @ mixing.mT + torch.eye(6))
    )
    encoder = PriorPromptEncoder([prior], coordinates, prior.sample(1, generator)[None])
    optimizer = torch.optim.LBFGS(
        encoder.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def objective():
        optimizer.zero_grad()
        theta = encoder()
        # mean NLL − (weight / N) · log p(θ), with unit noise
        nll = 0.5 * (outputs - inputs @ theta[0, 0]).square().mean()
        value = nll - weight / len(inputs) * encoder.log_prob(theta)
        value.backward()
        return value

    optimizer.step(objective)
    precision = torch.cholesky_inverse(prior.scale_tril)
    ridge = torch.linalg.solve(
        inputs.mT @ inputs + weight * precision, inputs.mT @ outputs + weight * precision @ prior.loc
    )
    assert torch.allclose(encoder()[0, 0], ridge, atol=1e-4)


def test_schedules_at_known_points():
    at = {name: [weight_factor(name, t) for t in (0.0, 0.25, 0.5, 1.0)] for name in ("constant", "linear", "cosine")}
    assert at["constant"] == [1, 1, 1, 1]
    assert at["linear"] == [0, 0.5, 1, 1]
    assert at["cosine"] == pytest.approx([0, 0.5 - math.cos(math.pi / 4) / 2, 0.5, 1])
    assert [weight_factor("cyclical", t) for t in (0, 0.0625, 0.125, 0.2, 0.25, 0.3125)] == [0, 0.5, 1, 1, 0, 0.5]
    with pytest.raises(ValueError, match="prior_weight_schedule must be one of constant, linear, cosine, cyclical"):
        PriorTrainingArguments(prior_weight_schedule="exponential")


def test_the_schedule_scales_the_objective(tmp_path):
    config = {"num_virtual_tokens": 4, "prior_weight": 0.5}
    trainer = make_trainer(tmp_path, config=config, prior_weight_schedule="linear", learning_rate=1e-6)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Logged after a step, when the next one's weight holds; the loss was computed before it.
    assert [entry["prior/weight"] for entry in entries] == [0.25, 0.5, 0.5, 0.5]
    for before, entry in zip([0.0, 0.25, 0.5, 0.5], entries, strict=True):
        penalty = -before / trainer.num_supervised_tokens * entry["prior/log_prob"]
        assert entry["loss"] - entry["prior/nll"] == pytest.approx(penalty, abs=2e-4)


def test_auto_takes_the_weight_with_the_least_held_out_loss(tmp_path, caplog):
    trainer = make_trainer(tmp_path, rows=30, config={"num_virtual_tokens": 4, "prior_weight": "auto"}, max_steps=3)
    start = coordinate(trainer)
    trainer.train()
    chosen = trainer.model.active_peft_config.prior_weight
    message = next(record.getMessage() for record in caplog.records if "was chosen by held-out" in record.getMessage())
    losses = {
        float(part.split(": ")[0]): float(part.split(": ")[1]) for part in message.split("(")[1][:-1].split(", ")
    }
    assert chosen in WEIGHT_GRID and losses[chosen] == min(losses.values())
    # What is trained then starts where it would have without the search.
    again = make_trainer(tmp_path, rows=30, config={"num_virtual_tokens": 4, "prior_weight": chosen}, max_steps=3)
    assert torch.equal(coordinate(again), start)
    again.train()
    assert torch.equal(coordinate(again), coordinate(trainer))
    few = make_trainer(tmp_path, rows=4, config={"num_virtual_tokens": 4, "prior_weight": "auto"})
    with pytest.raises(ValueError, match='prior_weight="auto" needs at least 5 training rows'):
        few.train()


@pytest.mark.slow
def test_auto_counts_a_weight_whose_training_fails_as_the_worst(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path, rows=30, config={"num_virtual_tokens": 4, "prior_weight": "auto"}, max_steps=2)
    step = PriorTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.model.active_peft_config.prior_weight in failing.weights:
            with torch.no_grad():
                self.model.prompt_encoder["default"].coordinate[:] = math.nan
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PriorTrainer, "training_step", failing)
    failing.weights = WEIGHT_GRID
    with pytest.raises(FloatingPointError, match="with every prior_weight in .*: lower learning_rate"):
        trainer.train()
    failing.weights = WEIGHT_GRID[:2]
    trainer.train()
    assert "0: inf, 0.03: inf" in caplog.text
    assert trainer.model.active_peft_config.prior_weight in WEIGHT_GRID[2:]
    assert coordinate(trainer).isfinite().all()


def test_a_point_prior_trains_with_weight_zero_and_is_refused_above(tmp_path):
    config = {"num_virtual_tokens": 4, "prior": "text", "prior_kwargs": {"text": "what is 3 ?", "spread": 0.0}}
    trainer = make_trainer(tmp_path, config=config | {"prior_weight": 0.0})
    trainer.train()
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert "prior/log_prob" not in entry and entry["prior/drift"] > 0
    with pytest.raises(ValueError, match="spread 0 has no density: set spread > 0, or prior_weight=0"):
        make_trainer(tmp_path, config=config | {"prior_weight": 1.0}).train()


def test_an_exclusion_prior_leads_out_of_its_region(tmp_path):
    config = PriorConfig(num_virtual_tokens=4, prior="exclusion", prior_weight=1e3)
    model = get_prior_model(make_model(), config, tokenizer=make_tokenizer())
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():  # inside: half of the excluded radius
        whitened = encoder.priors[0].to_whitened(encoder()[0])
        encoder.coordinate.copy_((whitened / whitened.norm(dim=-1, keepdim=True) * encoder.priors[0].inner / 2)[None])
    assert encoder.log_prob(encoder()) == -math.inf
    trainer = make_trainer(tmp_path, model=model, max_steps=60, max_grad_norm=0.0)
    trainer.train()
    # To the edge, where the truncated density has its mode: steps end on either side of it.
    radius = encoder.priors[0].to_whitened(encoder()[0]).norm(dim=-1)
    assert (radius > 0.95 * encoder.priors[0].inner).all()


def test_the_prior_of_the_configuration_reaches_the_objective():
    prior = GaussianPrior(torch.zeros(32), torch.ones(32))
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=4, prior=prior)).train()
    row = addition_rows(1)[0]
    ids = torch.tensor([make_tokenizer()(row["prompt"] + row["completion"])["input_ids"]])
    prompt = model.prompt_encoder["default"]()
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(prompt).sum()
    assert torch.allclose(model(input_ids=ids, labels=ids).log_prior, expected)
