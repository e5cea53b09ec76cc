"""What is measured is what the model gives for that prompt, and the model is left as it was."""

import copy

import pytest
import torch
from conftest import CONFIGS, LAYERS, WIDTH, addition_rows, make_model, make_tokenizer

from priors_peft import PriorConfig, get_prior_model
from priors_peft.analysis.activations import match_lengths, pool
from priors_peft.analysis.description import describe
from priors_peft.analysis.measure import (
    ablation_nlls,
    line_nlls,
    neuron_activations,
    no_prompt_nll,
    prompt_nll,
    prompt_nlls,
    replaced_prompt,
    task_activations,
)
from priors_peft.analysis.transfer import activation_overlap
from priors_peft.architecture import decoder
from priors_peft.data import tokenize
from priors_peft.evaluation import answer


P = 4
ROWS = [
    *addition_rows(5),
    {"prompt": "what is 3 ?", "completion": " 3 4 5"},
    {"prompt": "Question: what is 1 plus 2 plus 3 plus 4 ? Answer:", "completion": " 10"},
]


def tuned(architecture="llama", **settings):
    tokenizer = make_tokenizer()
    settings = {"num_virtual_tokens": P, "prior": "gaussian"} | settings
    model = get_prior_model(make_model(architecture), PriorConfig(**settings), tokenizer)
    return model, tokenizer, tokenize(ROWS, tokenizer)


def random_prompts(model, count, seed=0):
    shape = model.prompt_encoder["default"].initial_prompt.shape
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    with torch.no_grad():  # transformers puts hooks of its own on a model that is first asked for its states
        decoder(model.base_model)(torch.tensor([[5]]), output_hidden_states=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.named_parameters()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return state, tensors, [module.training for module in model.modules()], hooks, model._kept


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_likelihoods_are_those_of_evaluation(architecture):
    model, tokenizer, rows = tuned(architecture)
    assert prompt_nll(model, rows) == pytest.approx(answer(model, tokenizer, ROWS, 2).nll, rel=1e-5)
    assert no_prompt_nll(model, rows) == pytest.approx(answer(model.base_model, tokenizer, ROWS, 2).nll, rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"tuning": "deep"}, {"tuning": "deep", "layers": [0, -1]}])
@pytest.mark.parametrize("coordinates", ["whitened", "plain"])
def test_a_replaced_prompt_gives_what_a_model_with_it_gives(settings, coordinates):
    model, _, rows = tuned(coordinates=coordinates, **settings)
    other = copy.deepcopy(model)
    prompts = random_prompts(model, 3)
    for prompt, found in zip(prompts, prompt_nlls(model, rows, prompts).tolist(), strict=True):
        other.prompt_encoder["default"].set_prompt(prompt)
        assert found == pytest.approx(prompt_nll(other, rows), rel=1e-5)
        assert found == pytest.approx(prompt_nll(model, rows, prompt), rel=1e-6)


def everything(model, tokenizer, rows):
    prompts = random_prompts(model, 2)
    ids = [row["input_ids"] for row in rows]
    prompt_nll(model, rows)
    prompt_nlls(model, rows, prompts)
    no_prompt_nll(model, rows)
    ablation_nlls(model, rows)
    line_nlls(model, rows, *prompts, count=3)
    task_activations(model, ids, [0, -1])
    task_activations(model, ids, [1], with_prompt=False)
    neuron_activations(model, prompts)
    describe(model, tokenizer, prompts[0], layer=1, max_new_tokens=2)


@pytest.mark.parametrize("settings", [{}, {"tuning": "deep"}])
def test_nothing_is_left_changed(settings):
    model, tokenizer, rows = tuned(**settings)
    model.train()
    model.base_model.eval()
    before = snapshot(model)
    everything(model, tokenizer, rows)
    assert_same(before, snapshot(model))


def test_nothing_is_left_changed_by_an_error(monkeypatch):
    model, tokenizer, rows = tuned(tuning="deep")
    model.train()
    before, encoder = snapshot(model), model.prompt_encoder["default"]

    def fail(*arguments, **keywords):
        raise RuntimeError("out of memory")

    prompts = random_prompts(model, 2)
    monkeypatch.setattr(model.base_model.lm_head, "forward", fail)
    for run in (
        lambda: prompt_nlls(model, rows, prompts),
        lambda: no_prompt_nll(model, rows),
        lambda: neuron_activations(model, prompts),
        lambda: describe(model, tokenizer),
    ):
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
        assert_same(before, snapshot(model))
    assert model.prompt_encoder["default"] is encoder


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
def test_batch_size_and_order_don_t_matter(architecture):
    model, _, rows = tuned(architecture)
    prompts, ids = random_prompts(model, 2), [row["input_ids"] for row in rows]
    losses, states = prompt_nlls(model, rows, prompts), task_activations(model, ids, [0, 2])
    backwards = list(rows)[::-1]
    for size in (1, 3):
        assert torch.allclose(prompt_nlls(model, backwards, prompts, size), losses, rtol=1e-5)
        assert no_prompt_nll(model, backwards, size) == pytest.approx(no_prompt_nll(model, rows), rel=1e-5)
        for layer, found in task_activations(model, ids[::-1], [0, 2], batch_size=size).items():
            assert torch.allclose(found.flip(0), states[layer], atol=1e-4)


def test_the_same_twice_is_the_same_to_the_last_bit():
    model, _, rows = tuned()
    prompts = random_prompts(model, 3)
    assert torch.equal(prompt_nlls(model, rows, prompts), prompt_nlls(model, rows, prompts))


def test_a_kept_prompt_does_not_stand_in_for_another_that_lies_where_it_lay():
    model, _, rows = tuned()
    with model.cached_prompt():
        kept = [prompt_nlls(model, rows.select([0]), random_prompts(model, 1, seed)).item() for seed in range(60)]
    alone = [prompt_nlls(model, rows.select([0]), random_prompts(model, 1, seed)).item() for seed in range(60)]
    assert kept == alone


def test_ablations_replace_one_virtual_token_in_all_layers():
    model, _, rows = tuned(tuning="deep", layers=[0, 2])
    encoder = model.prompt_encoder["default"]
    found = ablation_nlls(model, rows)
    for index in range(P):
        prompt = encoder().detach().clone()
        prompt[:, index] = torch.stack([prior.loc for prior in encoder.priors])
        assert found[index].item() == pytest.approx(prompt_nll(model, rows, prompt), rel=1e-6)
    whole = prompt_nll(model, rows)
    assert ablation_nlls(model, rows, encoder().detach()).tolist() == pytest.approx([whole] * P, rel=1e-6)
    with pytest.raises(ValueError, match="replacement must have one entry for each of the 2 selected layers"):
        ablation_nlls(model, rows, torch.zeros(3, WIDTH))


def test_ablations_of_a_text_prior_put_the_description_back():
    model, tokenizer, rows = tuned(prior="text", prior_kwargs={"text": "what is 1 plus", "spread": 0.3})
    (prior,) = model.prompt_encoder["default"].priors
    with replaced_prompt(model, prior.loc[None]):
        whole = prompt_nll(model, rows)
        assert ablation_nlls(model, rows, prior.loc[None]).tolist() == pytest.approx([whole] * P, rel=1e-6)
    assert ablation_nlls(model, rows).std() > 0


def test_a_line_begins_and_ends_at_its_prompts():
    model, _, rows = tuned()
    start, end = random_prompts(model, 2)
    losses = line_nlls(model, rows, start, end, count=3)
    expected = [prompt_nll(model, rows, prompt) for prompt in (start, (start + end) / 2, end)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("with_prompt", [True, False])
def test_activations_are_those_of_each_row_alone(architecture, with_prompt):
    model, _, rows = tuned(architecture)
    base, ids = model.base_model, [row["input_ids"] for row in rows]
    found = task_activations(model, ids, [0, 1, LAYERS, -1], with_prompt, batch_size=3)
    theta = model.prompt_encoder["default"]()[0]
    for index, row in enumerate(ids):
        embedded = base.get_input_embeddings()(torch.tensor([row]))
        if with_prompt:
            embedded = torch.cat([theta[None], embedded], dim=1)
        with torch.no_grad():
            states = base(inputs_embeds=embedded, output_hidden_states=True).hidden_states
        for layer in (0, 1, LAYERS):
            expected = states[layer][:, -len(row) :].mean(1)[0]
            assert torch.allclose(found[layer][index], expected, atol=1e-4)
    assert torch.equal(found[-1], found[LAYERS])


def test_skipped_first_tokens_are_in_no_activation():
    model, _, rows = tuned()
    ids = [row["input_ids"] for row in rows]
    whole, rest = (task_activations(model, ids, [2], skip=skip)[2] for skip in (0, 1))
    first = task_activations(model, [row[:1] for row in ids], [2])[2]  # causal: what follows doesn't show in it
    lengths = torch.tensor([len(row) for row in ids])[:, None]
    assert torch.allclose(whole * lengths, rest * (lengths - 1) + first, atol=1e-3)


def test_a_prompt_shows_in_deeper_activations_only():
    model, _, rows = tuned()
    ids = match_lengths({"sums": [row["input_ids"] for row in rows], "long": [[5] * 9] * 7})["sums"]
    with_it, without = (task_activations(model, ids, [0, 2], prompted) for prompted in (True, False))
    assert torch.allclose(with_it[0], without[0], atol=1e-6)
    assert not torch.allclose(with_it[2], without[2], atol=1e-2)
    states = model.base_model.get_input_embeddings()(torch.tensor(ids[:1])).detach()
    assert torch.allclose(with_it[0][:1], pool(states, torch.ones(1, len(ids[0]))), atol=1e-6)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_neurons_are_read_after_the_prompt(architecture):
    model, _, _ = tuned(architecture)
    prompts = random_prompts(model, 3)
    prompts[2] = prompts[0]
    active = neuron_activations(model, prompts, token_id=7)
    assert active.dtype == torch.bool and active.shape[:2] == (3, LAYERS)
    assert torch.equal(active[0], active[2]) and not torch.equal(active[0], active[1])
    # By hand: the last layer's activation function at the last position of prompt and token as one sequence.
    base, values = model.base_model, []
    names = ("act_fn", "act", "gelu_impl", "activation_fn")
    (function,) = [m for n, m in base.named_modules() if f".{LAYERS - 1}." in n and n.split(".")[-1] in names]
    handle = function.register_forward_hook(lambda module, inputs, output: values.append(output))
    embedded = torch.cat([prompts[1], base.get_input_embeddings()(torch.tensor([[7]]))], dim=1)
    base(inputs_embeds=embedded)
    handle.remove()
    assert torch.equal(active[1, -1], values[0].flatten(0, -2)[-1] > 0)
    assert activation_overlap(active)[0, 2].item() == pytest.approx(1)


def test_a_prompt_of_tokens_is_described_as_their_text_is():
    model, tokenizer, _ = tuned()
    embed, base = model.base_model.get_input_embeddings(), model.base_model
    words, carrier = "what is 1 plus", ("Question: ", " Answer:")
    prompt = embed(torch.tensor(tokenizer(words)["input_ids"]))[None].detach()
    assert prompt.shape[1] == P
    ids = tokenizer(carrier[0] + words + carrier[1], return_tensors="pt")["input_ids"]
    said = base.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    expected = tokenizer.decode(said, skip_special_tokens=True)
    assert describe(model, tokenizer, prompt, carrier=carrier, max_new_tokens=6) == expected != ""
    # A deeper layer's states without the carrier are not those within it.
    others = {describe(model, tokenizer, prompt, layer, carrier, 6) for layer in range(LAYERS)}
    assert len(others) > 1


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("settings", [{}, {"tuning": "deep"}])
def test_every_architecture_describes(architecture, settings):
    model, tokenizer, _ = tuned(architecture, **settings)
    assert isinstance(describe(model, tokenizer, layer=LAYERS - 1, max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t, r: prompt_nll(m, []), "rows must hold an answer .* got 0 rows"),
        (lambda m, t, r: prompt_nll(m, ROWS), "rows must be tokenized, .* got .'completion', 'prompt'. in row 0"),
        (lambda m, t, r: prompt_nll(m, r, batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (lambda m, t, r: prompt_nll(m, r, torch.zeros(1, P + 1, WIDTH)), r"prompt must have the shape \[1, 4, 32\]"),
        (lambda m, t, r: prompt_nll(m, r, torch.full((1, P, WIDTH), torch.nan)), "prompts must be finite"),
        (lambda m, t, r: task_activations(m, [[1]], [9]), r"layers must be among -4 to 3 for this model, got \[9\]"),
        (lambda m, t, r: task_activations(m, [], [0]), "the number of rows must be an integer >= 1, got 0"),
        (lambda m, t, r: describe(m, t, layer=3), "layer must be between 0 and 2 for this model, got 3"),
        (lambda m, t, r: no_prompt_nll(m, [{"input_ids": [5], "labels": [5]}]), "rows must begin with a token that"),
    ],
)
def test_bad_input_is_named(call, message):
    model, tokenizer, rows = tuned()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer, rows)
    assert_same(before, snapshot(model))
