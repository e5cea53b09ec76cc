"""Priors are fitted in each layer's own space, on what was asked for, the same every time."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import LAYERS, VOCABULARY, WIDTH, addition_rows, make_model, make_tokenizer

from priors_peft import PriorConfig, PriorPeftModel, get_prior_model
from priors_peft.fitting import texts_of
from priors_peft.priors import GaussianPrior, Moments
from priors_peft.priors.reference import activation_references, vocabulary_ids, vocabulary_reference


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRIORS_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_with(**settings):
    config = PriorConfig(**{"num_virtual_tokens": 4} | settings)
    return get_prior_model(make_model(), config, tokenizer=make_tokenizer())


def encoder_of(model):
    return model.prompt_encoder["default"]


def test_special_and_untrained_rows_are_left_out():
    model, tokenizer = make_model(), make_tokenizer()
    weight = model.get_input_embeddings().weight.data
    weight[20] = 0
    weight[21] = weight[22]
    weight[23] *= 1e-3
    ids = vocabulary_ids(model.get_input_embeddings(), tokenizer).tolist()
    assert set(range(VOCABULARY)) - set(ids) == {0, 1, 2, 3, 20, 21, 22, 23, *range(len(tokenizer), VOCABULARY)}


def test_vocabulary_is_looked_up_as_the_model_does():
    model = make_model("gemma2")  # scales embeddings by √d
    (rows,), _ = vocabulary_reference(model, [0])
    ids = vocabulary_ids(model.get_input_embeddings(), None)
    assert torch.equal(rows, model.get_input_embeddings()(ids))
    assert torch.allclose(rows, model.get_input_embeddings().weight[ids] * WIDTH**0.5)


@pytest.mark.parametrize("source", ["vocabulary", "activations"])
def test_each_layer_has_its_own_reference(source):
    kwargs = {"data": addition_rows(40)} if source == "activations" else {}
    model = model_with(tuning="deep", prior="gaussian", reference=source, reference_kwargs=kwargs)
    priors = encoder_of(model).priors
    assert len(priors) == LAYERS and not torch.allclose(priors[1].loc, priors[2].loc)
    assert [entry.layer for entry in model.provenance["default"]] == list(range(LAYERS))


def test_activations_leave_padding_and_first_positions_out():
    model, tokenizer = make_model(), make_tokenizer()
    texts = ["1 2 3 4 5", "6 7", "8 9 10"]
    (found,), _ = activation_references(model, [0, 2], tokenizer, [texts])
    rows = []
    for text in texts:  # one by one: no padding at all
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        rows.append(model.base_model(input_ids=ids, output_hidden_states=True).hidden_states[2][0, 1:].detach())
    rows = torch.cat(rows)
    assert found[1].shape == tuple(rows.shape)
    assert torch.allclose(found[1].mean.float(), rows.mean(0), atol=1e-5)
    assert torch.allclose(found[1].covariance.float(), torch.cov(rows.mT, correction=0), atol=1e-4)


def test_two_corpora_are_matched_in_length():
    model, tokenizer = make_model(), make_tokenizer()
    found, provenance = activation_references(model, [0], tokenizer, [["1 2 3 4 5", "6 7"], ["1 2 3", "4 5 6 7 8"]])
    assert [part[0].shape[0] for part in found] == [3, 3]  # (3 − 1) + (2 − 1) each
    assert provenance[0].data != provenance[1].data


def test_token_frequencies_weigh_the_vocabulary():
    tokenizer = make_tokenizer()
    model = model_with(prior="gaussian", reference_kwargs={"data": ["40 40 40 41"]})
    ids = tokenizer.convert_tokens_to_ids(["40", "41"])
    rows = model.base_model.get_input_embeddings().weight[ids]
    expected = 0.75 * rows[0] + 0.25 * rows[1]
    assert torch.allclose(encoder_of(model).priors[0].loc, expected, atol=1e-6)


def test_fitting_is_cached_and_a_damaged_cache_is_computed_again(cache, monkeypatch, caplog):
    settings = {"tuning": "deep", "reference": "activations", "reference_kwargs": {"data": addition_rows(20)}}
    first = encoder_of(model_with(**settings))
    (file,) = (cache / "references").glob("*.safetensors")
    calls = []
    update = Moments.update
    monkeypatch.setattr(Moments, "update", lambda self, *args: calls.append(1) or update(self, *args))
    assert torch.equal(encoder_of(model_with(**settings))(), first()) and not calls
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(encoder_of(model_with(**settings))(), first()) and calls
    assert "is damaged" in caplog.text
    calls.clear()  # another model, other data: another entry
    get_prior_model(make_model(seed=1), PriorConfig(num_virtual_tokens=4, **settings), tokenizer=make_tokenizer())
    assert calls


def test_a_fitted_prior_is_cached_by_reference_and_settings(cache, monkeypatch, caplog):
    from priors_peft.priors import StructuredPrior

    fits = []
    fit = StructuredPrior.fit.__func__
    monkeypatch.setattr(StructuredPrior, "fit", classmethod(lambda cls, *a, **k: fits.append(1) or fit(cls, *a, **k)))
    settings = {"prior_kwargs": {"structure": "low_rank", "rank": 4}}
    first = encoder_of(model_with(**settings))()
    assert torch.equal(encoder_of(model_with(**settings))(), first) and len(fits) == 1
    model_with(prior_kwargs={"structure": "low_rank", "rank": 5})
    get_prior_model(make_model(seed=1), PriorConfig(num_virtual_tokens=4, **settings))
    assert len(fits) == 3
    for file in (cache / "priors").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(encoder_of(model_with(**settings))(), first) and len(fits) == 4
    assert "is fitted again" in caplog.text


def test_the_start_depends_on_the_seed_alone():
    torch.manual_seed(1)
    one = encoder_of(model_with(seed=5))()
    torch.manual_seed(2)
    assert torch.equal(one, encoder_of(model_with(seed=5))())
    assert not torch.equal(one, encoder_of(model_with(seed=6))())


@pytest.mark.parametrize("layers", ["all", [0, -1]])
def test_a_deep_prompt_does_at_first_what_the_soft_prompt_of_its_first_layer_does(architecture, layers):
    base, rest = make_model(architecture), torch.tensor([[5, 6, 7]])
    soft = get_prior_model(base, PriorConfig(num_virtual_tokens=4, seed=3))
    config = PriorConfig(num_virtual_tokens=4, seed=3, tuning="deep", layers=layers)
    deep = get_prior_model(base, config)
    assert torch.equal(encoder_of(deep)()[:1], encoder_of(soft)())
    assert torch.allclose(deep(input_ids=rest).logits, soft(input_ids=rest).logits, atol=1e-3)
    drawn = get_prior_model(base, replace(config, deep_init="draws"))
    assert torch.equal(encoder_of(deep)()[:1], encoder_of(drawn)()[:1])
    assert not torch.allclose(deep(input_ids=rest).logits, drawn(input_ids=rest).logits, atol=1e-2)


@pytest.mark.parametrize("layers", ["all", [0, -1]])
def test_a_deep_text_prompt_of_spread_zero_is_the_text(architecture, layers):
    tokenizer = make_tokenizer()
    text = "what is 3 plus 4 ?"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    config = PriorConfig(
        num_virtual_tokens=ids.shape[1],
        tuning="deep",
        layers=layers,
        prior="text",
        prior_kwargs={"text": text, "spread": 0.0},
        prior_weight=0.0,
    )
    base = make_model(architecture)
    rest = torch.tensor([tokenizer("5 6 7")["input_ids"]])
    expected = base(input_ids=torch.cat([ids, rest], 1)).logits[:, ids.shape[1] :]
    model = get_prior_model(base, config, tokenizer=tokenizer)
    assert torch.allclose(model(input_ids=rest).logits, expected, atol=1e-4)


def test_a_description_is_trimmed_or_cycled_as_peft_does():
    tokenizer = make_tokenizer()
    ids = tokenizer("1 2 3")["input_ids"]
    embedding = make_model().get_input_embeddings().weight
    for count, expected in ((2, ids[:2]), (7, (ids * 3)[:7])):
        config = {"prior": "text", "prior_kwargs": {"text": "1 2 3", "spread": 0.0}, "prior_weight": 0.0}
        model = model_with(num_virtual_tokens=count, coordinates="plain", **config)
        assert torch.equal(encoder_of(model)()[0], embedding[expected])


def test_a_longer_description_is_trimmed_with_a_warning(caplog):
    text = "one two three four"
    length = len(make_tokenizer()(text)["input_ids"])
    for count, warns in ((length, False), (length - 1, True)):
        config = PriorConfig(num_virtual_tokens=count, prior="text", prior_kwargs={"text": text})
        get_prior_model(make_model(), config, tokenizer=make_tokenizer())
        assert ("tokens, of which" in caplog.text) == warns
    assert f"has {length} tokens, of which the first {length - 1} are taken" in caplog.text


def test_interpolation_and_empirical_priors_through_the_configuration(tmp_path):
    data = [addition_rows(20), ["what is 1 ?", "2 3 4 5 6"] * 10]
    model = model_with(prior="interpolation", reference="activations", reference_kwargs={"data": data})
    assert encoder_of(model).log_prob(encoder_of(model)()).isfinite()
    for seed in (1, 2, 3):
        model_with(seed=seed, tuning="deep", layers=[0, 1]).save_pretrained(tmp_path / str(seed))
    adapters = [str(tmp_path / str(seed)) for seed in (1, 2, 3)]
    settings = {"reference": "adapters", "reference_kwargs": {"adapters": adapters}}
    model = model_with(prior="empirical", tuning="deep", layers=[0, 1], **settings)
    prompts = [PriorPeftModel.from_pretrained(make_model(), adapter) for adapter in adapters]
    mean = torch.stack([encoder_of(prompt)() for prompt in prompts]).mean(0)
    assert torch.allclose(torch.stack([prior.loc for prior in encoder_of(model).priors]), mean, atol=1e-5)
    model.save_pretrained(tmp_path / "empirical")
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path / "empirical", is_trainable=True)
    assert torch.equal(encoder_of(again)(), encoder_of(model)())
    described = json.loads((tmp_path / "empirical" / "prior_config.json").read_text())
    assert described["config"]["reference_kwargs"] == {"adapters": "3 items"}
    assert described["reference"][0]["source"] == "adapters"


STRUCTURES = {
    "gaussian": {"diagonal": True},
    "structured": {},
    "structured low_rank": {"structure": "low_rank", "rank": 4},
    "structured block": {"structure": "block", "block_size": 8},
    "structured mixture": {"structure": "mixture", "components": 3},
    "exclusion": {},
    "exclusion rejection": {"method": "rejection"},
    "text": {"text": "what is 3 ?"},
}


@pytest.mark.parametrize("case", STRUCTURES)
@pytest.mark.parametrize("tuning", ["soft", "deep"])
def test_every_family_trains_saves_and_loads(case, tuning, tmp_path):
    model = model_with(prior=case.split()[0], prior_kwargs=STRUCTURES[case], tuning=tuning)
    ids = torch.tensor([[5, 6, 7, 8]])
    outputs = model.train()(input_ids=ids, labels=ids)
    (outputs.loss - 1e-3 * outputs.log_prior).backward()
    assert encoder_of(model).coordinate.grad.isfinite().all() and outputs.log_prior.isfinite()
    model.save_pretrained(tmp_path)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    one, other = encoder_of(model), encoder_of(again)
    assert torch.equal(one(), other()) and torch.equal(one.log_prob(one()), other.log_prob(other()))


def test_a_users_own_distribution(tmp_path):
    distribution = torch.distributions.Independent(torch.distributions.Laplace(torch.zeros(WIDTH), 0.1), 1)
    model = model_with(prior=distribution)
    prompt = encoder_of(model)()
    assert torch.allclose(encoder_of(model).log_prob(prompt), distribution.log_prob(prompt[0]).sum())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names the prior .* which is its author's own: pass it again"):
        PriorPeftModel.from_pretrained(make_model(), tmp_path)
    config = PriorConfig(num_virtual_tokens=4, prior=distribution)
    again = PriorPeftModel.from_pretrained(make_model(), tmp_path, config=config)
    assert torch.equal(encoder_of(again)(), prompt)


def test_texts_of_rows():
    assert texts_of([{"prompt": "a", "completion": " b"}]) == ["a b"]
    assert texts_of([{"text": "a"}]) == texts_of(["a"]) == ["a"]
    with pytest.raises(ValueError, match="data must be strings, or rows .* got rows with \\['question'\\]"):
        texts_of([{"question": "a"}])
    with pytest.raises(ValueError, match="data must be a list of texts or rows, got the one text 'text'"):
        texts_of("text")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"reference": "words"}, "reference must be .* one of vocabulary, activations, adapters"),
        ({"reference": "activations"}, 'reference="activations" needs a tokenizer and reference_kwargs'),
        ({"reference": "adapters"}, 'reference="adapters" needs reference_kwargs'),
        ({"prior": "interpolation"}, 'prior="interpolation" needs two references'),
        ({"prior": "empirical"}, 'prior="empirical" is fitted on reference="adapters"'),
        ({"prior": "text"}, 'prior="text" needs a tokenizer and prior_kwargs'),
        ({"prior": "gaussian", "prior_kwargs": {"sigma": 1}}, "prior_kwargs of prior='gaussian' must be among"),
        (
            {"prior": "text", "prior_kwargs": {"text": "1", "sprad": 1}},
            "must be among text, spread, covariance, got sprad",
        ),
        ({"reference": torch.zeros(5, 7)}, "prior must have the model's width 32, got one of width 7"),
    ],
)
def test_bad_references_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        model_with(**settings)


def test_prompts_of_another_shape_are_no_reference(tmp_path):
    model_with(num_virtual_tokens=3).save_pretrained(tmp_path)
    kwargs = {"adapters": [str(tmp_path)] * 2}
    with pytest.raises(ValueError, match="adapters must hold prompts of shape \\(1, 4, 32\\), got \\(1, 3, 32\\)"):
        model_with(prior="empirical", reference="adapters", reference_kwargs=kwargs)


def test_a_prior_object_is_copied_for_each_layer():
    prior = GaussianPrior(torch.zeros(WIDTH), torch.ones(WIDTH))
    model = model_with(prior=prior, tuning="deep")
    assert all(own is not prior for own in encoder_of(model).priors)
