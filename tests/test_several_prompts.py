"""Prompts that are trained at once become what they would have become alone."""

import copy

import pytest
import torch
from conftest import addition_rows, make_model, make_tokenizer
from test_model import assert_close, without_dropout
from test_trainer import StopAfter

from priors_peft import PriorConfig, PriorPeftModel, PriorTrainer, PriorTrainingArguments, get_prior_model
from priors_peft.evaluation import answer_metrics
from priors_peft.tasks.metrics import exact_match


pytestmark = pytest.mark.slow


CONFIGS = {
    "seed0": {"num_virtual_tokens": 4, "prior_weight": 1.0},
    "seed1": {"num_virtual_tokens": 4, "seed": 1, "prior_weight": 0.0},
    "longer": {"num_virtual_tokens": 6, "prior": "gaussian", "coordinates": "plain"},
    "deep": {"num_virtual_tokens": 4, "tuning": "deep", "layers": [0, -1]},
    "spread": {"num_virtual_tokens": 4, "inference": "variational", "inference_kwargs": {"rank": 2}},
    "mixture": {"num_virtual_tokens": 4, "inference": "variational", "inference_kwargs": {"components": 3}, "seed": 2},
    "evidence": {
        "num_virtual_tokens": 4,
        "inference": "variational",
        "prior_kwargs": {"scale": "evidence"},
        "seed": 1,
    },
}
RATES = {"seed1": 1.0}


def model_with(names, architecture="llama"):
    tokenizer, model = make_tokenizer(), None
    for name in names:
        config = PriorConfig(**CONFIGS[name])
        if model is None:
            model = get_prior_model(make_model(architecture), config, tokenizer=tokenizer, adapter_name=name)
        else:
            model.add_adapter(name, config)
    without_dropout(model)
    return model


def train(folder, names, model=None, resume=False, callbacks=None, compute_metrics=None, **settings):
    trainer = PriorTrainer(
        model=model or model_with(names),
        args=PriorTrainingArguments(
            **{
                "output_dir": str(folder),
                "max_steps": 6,
                "per_device_train_batch_size": 4,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_steps": 2,
                "disable_tqdm": True,
            }
            | settings
        ),
        train_dataset=addition_rows(16),
        eval_dataset=addition_rows(6, start=400),
        processing_class=make_tokenizer(),
        adapter_names=names,
        learning_rates={name: rate for name, rate in RATES.items() if name in names},
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def prompts(trainer):
    return {name: trainer.model.prompt_encoder[name]().detach() for name in trainer.adapter_names}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_becomes_what_it_becomes_alone(tmp_path, architecture, accumulation):
    names = list(CONFIGS)
    settings = {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.1}
    together = train(tmp_path, names, model=model_with(names, architecture), **settings)
    log = next(entry for entry in together.state.log_history if entry.get("step") == 4)
    figures = together.evaluate()
    for name in names:
        alone = train(tmp_path, [name], model=model_with([name], architecture), **settings)
        assert_close(prompts(together)[name], prompts(alone)[name], 1e-4)
        start = alone.model.prompt_encoder[name].initial_prompt
        assert (prompts(alone)[name] - start).norm() > 0.01 * start.norm()
        entry = next(entry for entry in alone.state.log_history if entry.get("step") == 4)
        for key in ("prior/nll", "prior/drift", "prior/weight"):
            assert log[f"{key}/{name}"] == pytest.approx(entry[key], rel=1e-3)
        assert figures[f"eval_loss/{name}"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-4)
    assert figures["eval_loss"] == pytest.approx(sum(figures[f"eval_loss/{name}"] for name in names) / len(names))


def test_each_row_goes_with_its_own_prompt():
    names = list(CONFIGS)
    model = model_with(names)
    ids = torch.randint(3, 90, (6, 5), generator=torch.Generator().manual_seed(0))
    rows = ["deep", "seed0", "longer", "seed0", "deep", "seed1"]
    for training in (True, False):
        model.train(training)
        mixed = model(input_ids=ids, labels=ids, adapter_names=rows)
        for row, name in enumerate(rows):
            model.active_adapter = name
            alone = model(input_ids=ids[row : row + 1], labels=ids[row : row + 1], return_logits=True)
            assert torch.allclose(mixed.row_nll[row], alone.row_nll[0], rtol=1e-4)
            if not training:
                assert torch.allclose(mixed.logits[row], alone.logits[0], atol=1e-4)
    with pytest.raises(
        ValueError, match="adapter_names must name one of .*seed0.* for each of the 6 rows, got \\['x'"
    ):
        model(input_ids=ids, labels=ids, adapter_names=["x"] * 6)
    with pytest.raises(ValueError, match="use_cache must be False for rows with different prompts"):
        model(input_ids=ids, adapter_names=rows, use_cache=True)


def test_they_resume_to_the_last_bit(tmp_path):
    names = ["seed0", "seed1", "spread"]
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "whole", names, **settings)
    train(tmp_path / "cut", names, callbacks=[StopAfter(3)], **settings)
    resumed = train(tmp_path / "cut", names, resume=True, **settings)
    assert resumed.state.global_step == 6
    for name in names:
        assert torch.equal(prompts(resumed)[name], prompts(whole)[name])
    whole.save_model()
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path / "whole" / "seed1")
    assert torch.equal(again.prompt_encoder["default"](), prompts(whole)["seed1"])


@pytest.mark.parametrize("config", [{}, {"prior_weight": "auto"}, {"inference": "sghmc"}])
def test_a_prompt_that_is_not_the_active_one_is_trained_as_alone(tmp_path, monkeypatch, config):
    monkeypatch.setitem(CONFIGS, "other", {"num_virtual_tokens": 4, "seed": 2, **config})
    alone, model = train(tmp_path, ["other"]), model_with(["seed1", "other"])
    before = copy.deepcopy(model.prompt_encoder["seed1"].state_dict())
    trainers = [
        PriorTrainer(model, alone.args, addition_rows(16), processing_class=make_tokenizer(), adapter_names=[name])
        for name in ("other", "seed1")
    ]
    trainers[0].train()
    assert_close(prompts(trainers[0])["other"], prompts(alone)["other"], 1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.prompt_encoder["seed1"].state_dict().items())
    assert model.peft_config["seed1"].prior_weight == 0.0 and model.active_adapter == "other"


@pytest.mark.parametrize("names", [["seed0", "evidence"], ["evidence", "seed0"]])
def test_the_scale_of_most_evidence_is_found_beside_a_mode(tmp_path, names):
    together, alone = train(tmp_path, names), train(tmp_path, ["evidence"])
    found, expected = (one.model.prompt_encoder["evidence"].priors[0].scale_tril for one in (together, alone))
    assert_close(found, expected, 1e-4)


def test_rows_of_another_than_the_active_prompt_are_averaged_over_its_draws():
    model = model_with(["seed0", "spread"]).eval()
    ids = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(0))
    losses = []
    for active in ("seed0", "spread"):
        model.active_adapter = active
        with torch.no_grad(), model.averaged(4):
            losses.append(model(input_ids=ids, labels=ids, adapter_names=["spread"] * 2).loss)
    assert torch.equal(*losses)
    with torch.no_grad():
        assert losses[0] != model(input_ids=ids, labels=ids).loss


def test_answers_are_measured_for_each(tmp_path):
    tokenizer = make_tokenizer()
    metrics = answer_metrics(tokenizer, lambda answers, truth: {"exact_match": exact_match(answers, truth)})
    trainer = train(tmp_path, ["seed0", "seed1"], compute_metrics=metrics, max_steps=1, max_new_tokens=2)
    assert {"eval_exact_match/seed0", "eval_exact_match/seed1", "eval_loss"} <= set(trainer.evaluate())
    assert trainer.model.active_adapter == "seed0"


def test_bad_arguments_are_refused(tmp_path):
    model = model_with(["seed0", "seed1"])
    for argument, given in (
        ({"adapter_names": ["seed0", "seed2"]}, "adapter_names must name prompts among .*'seed1'.*got .*seed2"),
        ({"adapter_names": ["seed0", "seed0"]}, "adapter_names must name prompts among .* each once"),
        (
            {"learning_rates": {"seed1": 0.1}},
            "learning_rates must name prompts among \\['seed0'\\].*got \\['seed1'\\]",
        ),
    ):
        with pytest.raises(ValueError, match=given):
            PriorTrainer(model=model, processing_class=make_tokenizer(), **argument)
    best = PriorTrainingArguments(
        output_dir=str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps"
    )
    with pytest.raises(ValueError, match="load_best_model_at_end must be False for several adapter_names"):
        PriorTrainer(model=model, args=best, processing_class=make_tokenizer(), adapter_names=["seed0", "seed1"])
