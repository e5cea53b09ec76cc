"""Forward and backward are stock PEFT's, whatever the architecture, the padding and the path."""

import pytest
import torch
from conftest import CONFIGS, LAYERS, VOCABULARY, WIDTH, make_model
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from priors_peft import PriorConfig, get_prior_model
from priors_peft.passes import Prompt, prompt_pass
from priors_peft.priors import GaussianPrior


TOKENS = 5
SHAPES = {"soft": {"tuning": "soft"}, "deep": {"tuning": "deep", "layers": "all"}}
GAUSSIAN = {"prior": "gaussian", "num_virtual_tokens": TOKENS, "coordinates": "plain"}


def batch(rows=3, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def stock_twin(architecture, prompt):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    stock = get_peft_model(make_model(architecture), config)
    stock.prompt_encoder["default"].embedding.weight.data.copy_(prompt)
    return stock


def gradient(model, parameter, **inputs):
    parameter.grad = None
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), parameter.grad.clone()


def assert_close(ours, theirs, relative):
    assert (ours - theirs).norm() <= relative * theirs.norm()


def without_dropout(model):
    """In training stock PEFT draws a dropout mask for the prompt in every row, we draw one for all of them."""
    for layer in model.modules():
        for name in ("p", "dropout", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)


@pytest.mark.parametrize("first_supervised", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_loss_and_gradient_equal_stock(architecture, training, first_supervised):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN))
    encoder = model.prompt_encoder["default"]
    stock = stock_twin(architecture, encoder()[0].detach())
    for module in (model, stock):
        module.train(training)
        without_dropout(module)
    inputs = batch()
    if first_supervised:
        inputs["labels"] = inputs["input_ids"]
    loss, ours = gradient(model, encoder.coordinate, **inputs)
    expected, theirs = gradient(stock, stock.prompt_encoder["default"].embedding.weight, **inputs)
    assert abs(loss - expected) < 1e-5
    assert_close(ours[0], theirs, 1e-4)


def test_whole_logits_are_aligned_and_equal_stock(architecture):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN))
    stock = stock_twin(architecture, model.prompt_encoder["default"]()[0].detach())
    inputs = batch()
    with torch.no_grad():
        expected = stock(**inputs).logits[:, TOKENS:]
        for extra in ({}, {"labels": None}):
            assert torch.allclose(model(**inputs | extra).logits, expected, atol=1e-4)
            for kept in (1, 4):
                assert torch.allclose(
                    model(**inputs | extra, logits_to_keep=kept).logits, expected[:, -kept:], atol=1e-4
                )
        assert model.train()(**inputs).logits is None
        assert model(**inputs, return_logits=True).logits.shape == expected.shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_padded_rows_give_what_they_give_alone(architecture, shape, side, checkpointing):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN | SHAPES[shape]))
    if checkpointing:  # the concatenating path
        model.base_model.activation_checkpointing_enable()
        model.train()
        without_dropout(model)
    # First tokens are supervised too: after left padding it is the prompt that predicts them.
    rows = [row | {"labels": row["input_ids"]} for row in (batch(1, length, seed=length) for length in (4, 7, 9))]
    alone = [model(**row).row_nll for row in rows]
    padded = {
        name: torch.cat(
            [
                torch.nn.functional.pad(
                    row[name],
                    (9 - row[name].shape[1], 0) if side == "left" else (0, 9 - row[name].shape[1]),
                    value=fill,
                )
                for row in rows
            ]
        )
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
    }
    assert torch.allclose(model(**padded).row_nll, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_concatenating_path_gives_the_same_gradient(architecture, shape):
    def build(checkpointing):
        model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN | SHAPES[shape]))
        if checkpointing:
            model.base_model.activation_checkpointing_enable()
        model.train()
        without_dropout(model)
        assert model._concatenates(training=True) == checkpointing
        return gradient(model, model.prompt_encoder["default"].coordinate, **batch())

    (loss, grads), (other_loss, other_grads) = build(False), build(True)
    assert abs(loss - other_loss) < 1e-5
    assert_close(other_grads, grads, 1e-4)
    assert all(layer.norm() > 0 for layer in grads)


def test_deep_with_the_embedding_layer_alone_is_soft(architecture):
    soft = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN))
    deep = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN, tuning="deep", layers=[0]))
    one, other = (gradient(model, model.prompt_encoder["default"].coordinate, **batch()) for model in (soft, deep))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_deep_prompt_replaces_hidden_states():
    model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN, tuning="deep", layers=[0, -1]))
    prompt = model.prompt_encoder["default"]()
    seen = {}
    layers = model.base_model.base_model.layers
    for index, layer in enumerate(layers):

        def record(module, arguments, output, index=index):
            seen[index] = arguments[0], output

        layer.register_forward_hook(record)
    prompt_pass(model.base_model, Prompt(prompt, [0, LAYERS - 1], []))
    assert torch.equal(seen[0][0][0], prompt[0])
    assert torch.equal(seen[1][0], seen[0][1])  # an unselected layer: states flow through
    assert torch.equal(seen[LAYERS - 1][0][0], prompt[1])


def test_only_the_prompt_has_gradients():
    model = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=TOKENS))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder.default.coordinate", "prompt_encoder.default.posterior.rho"}
    assert model.prompt_encoder["default"].coordinate.shape == (1, TOKENS, WIDTH)
    model(**batch()).loss.backward()
    assert all(p.grad is None for p in model.base_model.parameters())
    assert model.get_nb_trainable_parameters()[0] == 2 * TOKENS * WIDTH


@pytest.mark.parametrize("coordinates", ["plain", "whitened"])
def test_coordinates_start_from_the_same_prompt(coordinates):
    config = PriorConfig(num_virtual_tokens=TOKENS, coordinates=coordinates, seed=3)
    encoder = get_prior_model(make_model(), config).prompt_encoder["default"]
    assert torch.allclose(encoder(), encoder.initial_prompt, atol=1e-5)
    assert encoder.drift(encoder()) < 1e-4
    reference = get_prior_model(make_model(), PriorConfig(num_virtual_tokens=TOKENS, seed=3, coordinates="plain"))
    assert torch.equal(encoder.initial_prompt, reference.prompt_encoder["default"].initial_prompt)


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_equals_stock_greedy_and_beams(architecture, arguments):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN))
    stock = stock_twin(architecture, model.prompt_encoder["default"]()[0].detach()).eval()
    inputs = batch()
    common = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    common |= {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "eos_token_id": None} | arguments
    assert torch.equal(model.generate(**common), stock.generate(**common))


@pytest.mark.parametrize("shape", SHAPES)
def test_left_padded_generation_gives_what_a_row_gives_alone(architecture, shape):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN | SHAPES[shape]))
    row = batch(1, 4)["input_ids"]
    padded = torch.nn.functional.pad(row, (3, 0), value=0)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **arguments)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **arguments)[:, 7:], alone[:, 4:])


def test_generation_goes_step_by_step_with_the_forward(architecture):
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN, tuning="deep"))
    ids = batch(2, 5)["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        for _ in range(4):  # no cache: the whole text again
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        outputs = model(input_ids=expected[:, :5], use_cache=True)  # by hand over the returned cache
        step = model(input_ids=outputs.logits[:, -1:].argmax(-1), past_key_values=outputs.past_key_values)
    assert torch.equal(ids, expected)
    assert torch.equal(step.logits[:, -1].argmax(-1), expected[:, 6])


def test_generation_does_not_depend_on_the_base_models_cache_setting():
    ids = batch(2, 5)["input_ids"]
    texts = []
    for use_cache in (True, False):  # Trainer leaves False
        model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN, tuning="deep"))
        model.base_model.config.use_cache = use_cache
        texts.append(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=use_cache))
    assert torch.equal(*texts)


def test_disabled_adapter_is_the_base_model():
    base = make_model()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    expected = base(**inputs).logits
    text = base.generate(**inputs, max_new_tokens=4, do_sample=False)
    model = get_prior_model(base, PriorConfig(**GAUSSIAN))
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), text)
    assert not torch.allclose(model(**inputs).logits, expected)


def test_named_adapters_live_side_by_side():
    model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN))
    first = model(**batch()).loss
    model.add_adapter("deep", PriorConfig(**GAUSSIAN | {"tuning": "deep", "num_virtual_tokens": 3, "seed": 1}))
    assert torch.equal(model(**batch()).loss, first)
    model.set_adapter("deep")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["prompt_encoder.deep.coordinate"]
    assert not torch.equal(model(**batch()).loss, first)
    model.delete_adapter("deep")
    assert model.active_adapter == "default" and torch.equal(model(**batch()).loss, first)


def test_pipeline_takes_the_model(tokenizer, caplog):
    from transformers import pipeline

    model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN), tokenizer=tokenizer)
    with caplog.at_level("WARNING", logger="transformers"):
        generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert "not supported" not in caplog.text
    text = generator("what is 3 plus 4 ?", max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = tokenizer("what is 3 plus 4 ?", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert text[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_unsupervised_batch_has_zero_loss():
    model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN))
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = gradient(model.train(), model.prompt_encoder["default"].coordinate, **inputs)
    assert loss == 0 and not grads.any()


def test_num_items_in_batch_divides_the_sum():
    model = get_prior_model(make_model(), PriorConfig(**GAUSSIAN))
    outputs = model(**batch(), num_items_in_batch=7)
    assert torch.allclose(outputs.loss, outputs.row_nll.sum() / 7)
    assert outputs.row_tokens.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer >= 1, got 0"),
        ({"num_virtual_tokens": 2.5}, "num_virtual_tokens must be an integer >= 1, got 2.5"),
        ({"seed": "1"}, "seed must be an integer >= 0, got '1'"),
        ({"num_virtual_tokens": 128}, "num_virtual_tokens must leave room for text in the model's context of 128"),
        ({"tuning": "wide"}, "tuning must be one of soft, deep, got 'wide'"),
        ({"prior": "gausian"}, "prior must be a Prior object or one of .*got 'gausian'. Did you mean 'gaussian'"),
        ({"prior_weight": -1.0}, 'prior_weight must be a number >= 0 or "auto", got -1.0'),
        ({"layers": [0, 1]}, 'layers must be None or \\[0\\] for tuning="soft"'),
        ({"tuning": "deep", "layers": [1]}, "layers must contain 0"),
        ({"tuning": "deep", "layers": [0, 9]}, "layers must be in \\[-3, 3\\) for this model, got \\[9\\]"),
        ({"prior": GaussianPrior(torch.zeros(8), torch.ones(8))}, "prior must have the model's width 32"),
    ],
)
def test_bad_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        get_prior_model(make_model(), PriorConfig(**{"num_virtual_tokens": TOKENS} | arguments))


def test_bad_base_models_are_refused():
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    encoder = BertForMaskedLM(BertConfig(**small))
    with pytest.raises(ValueError, match="model must be decoder-only .* got BertForMaskedLM"):
        get_prior_model(encoder, PriorConfig(**GAUSSIAN))
    both = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="model must be decoder-only"):
        get_prior_model(both, PriorConfig(**GAUSSIAN))
    headless = make_model().base_model
    with pytest.raises(ValueError, match="model must have a language-model head"):
        get_prior_model(headless, PriorConfig(**GAUSSIAN))
    blind = make_model()
    blind.get_input_embeddings = lambda: None
    with pytest.raises(ValueError, match="model must have input embeddings"):
        get_prior_model(blind, PriorConfig(**GAUSSIAN))


def test_the_grid_covers_grouped_query_and_sliding_attention():
    assert CONFIGS["llama"].num_key_value_heads < CONFIGS["llama"].num_attention_heads
    assert "sliding_attention" in CONFIGS["gemma2"].layer_types


def test_a_kept_prompt_runs_once_and_again_when_it_changed(architecture, monkeypatch):
    from priors_peft import model as module

    passes = []
    monkeypatch.setattr(module, "prompt_pass", lambda *given: passes.append(given) or prompt_pass(*given))
    model = get_prior_model(make_model(architecture), PriorConfig(**GAUSSIAN))
    model.add_adapter("other", PriorConfig(**GAUSSIAN | {"seed": 1}))
    ids = batch(2, 5)["input_ids"]
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}

    def outputs():
        with torch.no_grad():
            return model(input_ids=ids).logits, model.generate(input_ids=ids, **arguments)

    expected = outputs()
    passes.clear()
    with model.cached_prompt():
        for _ in range(2):
            assert all(torch.equal(*pair) for pair in zip(outputs(), expected, strict=True))
        assert len(passes) == 1
        model.set_adapter("other")
        assert not torch.equal(outputs()[0], expected[0]) and len(passes) == 2
        model.set_adapter("default")
        assert torch.equal(outputs()[0], expected[0]) and len(passes) == 2
        encoder = model.prompt_encoder["default"]
        encoder.set_prompt(encoder() + 1)
        assert not torch.equal(outputs()[0], expected[0]) and len(passes) == 3
        assert model(**batch()).loss.requires_grad and len(passes) == 4  # gradients need a pass of their own
    outputs()
    assert len(passes) == 6
