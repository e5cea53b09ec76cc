"""Cards tell how sure a prompt is, and what was drawn from its posterior."""

import json
import re

import pytest
from conftest import addition_rows, make_model, make_tokenizer
from huggingface_hub import ModelCard
from test_card import make_base, train

from priors_peft import PriorConfig, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.cli import main
from priors_peft.hub.card import CARD
from priors_peft.hub.facts import read_facts


def row(card, name):
    """The cells of a row of the card's tables."""
    return next(line for line in card.splitlines() if line.startswith(f"| {name} |")).split(" | ")[1:]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("posterior")


@pytest.fixture(scope="module")
def variational(place):
    flags = ("--inference", "variational", "--prior_weight", "0.1", "--posterior_draws", "3")
    return train(make_base(place), place / "out", *flags)


def test_a_trained_posteriors_card_has_its_mean_beside_the_average(variational):
    card, facts = (variational / CARD).read_text(), read_facts(variational)
    (average,), (mean,) = facts.results.values(), facts.mean_results.values()
    assert average["loss"] != mean["loss"] and facts.posterior_draws == 3
    for name, figures in (("this prompt alone", mean), ("this prompt, averaged over 3 draws", average)):
        assert row(card, name)[:2] == [f"{figures['loss']:.4g}", f"{figures['ece']:.4g}".rstrip("0")]
    assert "a Gaussian with a variance for each coordinate (variational inference)" in card
    assert "![How often the likeliest token is right, by its probability](reliability.png)" in card
    assert (variational / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert facts.calibration.keys() == {"default", "default alone"}
    assert "1 is Bayes' rule, less is colder" in card and "posterior's mode" not in card
    measured = {result.metric_type: result.metric_name for result in ModelCard(card).data.eval_results}
    assert measured["nll"] == "NLL (nats per answer token), averaged over 3 draws"
    assert 'inference: "variational"' in card


def test_evaluate_measures_what_training_did(variational, place, capsys):
    given = ["--train_file", str(place / "rows.jsonl"), "--num_eval", "8", "--posterior_draws", "3"]
    facts = read_facts(variational)
    assert main(["evaluate", str(variational), *given]) == 0
    assert re.search(r"\| NLL \(nats/token\) +\| ECE", capsys.readouterr().out)
    kept = json.loads((variational / "evaluation.json").read_text())
    pairs = (("this prompt", facts.mean_results), ("averaged over 3 draws", facts.results))
    for name, trained in pairs:
        assert kept["figures"][name]["nll"] == pytest.approx(trained["default"]["loss"], rel=1e-4)
        assert kept["figures"][name]["ece"] == pytest.approx(trained["default"]["ece"], abs=1e-4)
        assert kept["calibration"][name]["error"] == kept["figures"][name]["ece"]
    card = (variational / CARD).read_text()
    for name in ("no prompt", "this prompt alone", "this prompt, averaged over 3 draws"):
        assert row(card, name)


@pytest.mark.parametrize(
    ("inference", "settings", "told"),
    [
        ("map", {}, None),
        ("laplace", {"num_draws": 3}, "narrower than the prior in 3 directions"),
        ("sghmc", {"num_samples": 2, "cycles": 1}, "2 draws of a Markov chain"),
        ("svgd", {"num_particles": 2}, "2 particles"),
        ("variational", {"components": 3}, "a mixture of 3 Gaussians, each with a variance for each coordinate (var"),
        (
            "variational",
            {"components": 2, "rank": 4},
            "a mixture of 2 Gaussians, each with a variance for each coordinate and 4",
        ),
    ],
)
def test_what_was_drawn_is_said(tmp_path, inference, settings, told):
    tokenizer, rows = make_tokenizer(), addition_rows(12)
    config = PriorConfig(num_virtual_tokens=4, inference=inference, inference_kwargs=settings)
    model = get_prior_model(make_model(), config, tokenizer=tokenizer)
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = PriorTrainingArguments(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=4, **quiet)
    trainer = PriorTrainer(model, args, rows, rows[:4], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    # What was logged in training was of the mode or of particles, where the posterior is found at the end.
    assert (read_facts(tmp_path).results == {}) == (inference in ("laplace", "svgd"))
    trainer.evaluate(rows[4:])  # other rows' calibration is not the prompt's on its own
    assert read_facts(tmp_path).calibration == {} and "reliability.png" not in (tmp_path / CARD).read_text()
    trainer.evaluate()
    card = (tmp_path / CARD).read_text()
    assert read_facts(tmp_path).calibration.keys() == {"default"} | ({"default alone"} if told else set())
    assert "![How often" in card and "ECE" in card
    assert (told is None) == ("The posterior is" not in card) and (told or "") in card
    assert (told is None) == ("this prompt alone" not in card)


def make_trainer(folder, eval_rows=4, inference="variational", **settings):
    tokenizer, rows = make_tokenizer(), addition_rows(12)
    config = PriorConfig(num_virtual_tokens=4, inference=inference, prior_weight=0.1)
    model = get_prior_model(make_model(), config, tokenizer=tokenizer)
    quiet = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1}
    parts = rows[:eval_rows] if isinstance(eval_rows, int) else {name: rows[:of] for name, of in eval_rows.items()}
    args = PriorTrainingArguments(str(folder), **quiet | settings)
    return PriorTrainer(model, args, rows, parts, processing_class=tokenizer)


def test_the_mean_is_measured_as_the_average_is_in_what_precision_whatever_and_by_all_processes(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    trainer.save_model()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "is_world_process_zero", lambda: False)
        loops = []
        own = trainer.prediction_step
        patch.setattr(trainer, "prediction_step", lambda *given, **named: loops.append(0) or own(*given, **named))
        trainer.evaluate()
        assert len(loops) == 2  # its part of the rows, averaged and alone
    trainer.evaluate()
    (mean,) = read_facts(tmp_path).mean_results.values()
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2 and mean["loss"] not in logged
    trainer.model.prompt_encoder["default"].posterior = None
    assert trainer.evaluate()["eval_loss"] == mean["loss"]


@pytest.mark.parametrize("inference", ["map", "variational"])
def test_each_of_several_evaluation_sets_has_its_own_calibration(tmp_path, inference):
    trainer = make_trainer(tmp_path, {"one": 3, "two": 7}, inference)
    trainer.train()
    trainer.save_model()
    trainer.evaluate()
    facts, names = read_facts(tmp_path), ["default"] + ["default alone"] * (inference != "map")
    assert facts.calibration.keys() == {f"{name}, {part}" for name in names for part in ("one", "two")}
    for name in names:
        figures = (facts.mean_results if "alone" in name else facts.results)["default"]
        for part in ("one", "two"):
            found = facts.calibration[f"{name}, {part}"]
            assert found["error"] == figures[f"{part}_ece"] and sum(found["counts"]) == 2 * {"one": 3, "two": 7}[part]
    card = (tmp_path / CARD).read_text()
    assert "![How often" in card and "ECE is the expected calibration error" in card
    assert row(card, "this prompt" if inference == "map" else "this prompt, averaged over 8 draws")
