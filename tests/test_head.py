"""The LM head on chosen states is the model's own, and in chunks it is the same."""

import pytest
import torch
from conftest import VOCABULARY, WIDTH, make_model
from test_model import assert_close

from priors_peft import head
from priors_peft.head import logits_of, supervised_nll


def states(count=7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, WIDTH, generator=generator)
    return hidden.requires_grad_(), torch.randint(VOCABULARY, (count,), generator=generator)


def test_logits_are_the_models_own(architecture):
    model = make_model(architecture)
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(logits_of(model, hidden), model(input_ids=ids).logits)
        # and the layers are there again
        assert torch.equal(model.base_model(input_ids=ids).last_hidden_state, hidden)


def test_a_forward_that_others_put_there_is_put_back():
    model = make_model()
    layers, calls = model.get_decoder(), []
    original = layers.forward

    def wrapped(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    layers.forward = wrapped
    logits_of(model, states()[0][None])
    assert not calls
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert calls and layers.forward is wrapped


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_likelihood_and_gradient_are_those_of_cross_entropy_in_chunks_of_any_size(architecture, monkeypatch, rows):
    model, sizes = make_model(architecture).requires_grad_(False), []
    weights = torch.linspace(-1, 1, 7)  # tokens need not count alike
    hidden, targets = states()
    expected = torch.nn.functional.cross_entropy(logits_of(model, hidden[None])[0], targets, reduction="none")
    (expected * weights).sum().backward()
    expected_gradient = hidden.grad
    monkeypatch.setattr(head, "MOST_LOGITS", rows * VOCABULARY)
    monkeypatch.setattr(head, "logits_of", lambda *given: sizes.append(given[1].shape[1]) or logits_of(*given))
    hidden, targets = states()
    nll = supervised_nll(model, hidden, targets)
    (nll * weights).sum().backward()
    assert torch.allclose(nll, expected, atol=1e-5)
    assert_close(hidden.grad, expected_gradient, 1e-5)
    assert max(sizes) <= rows and sum(sizes) == 7 and len(sizes) == -(-7 // rows)
    with torch.no_grad():
        assert torch.equal(supervised_nll(model, *states()), nll)


def test_half_precision_likelihoods_are_float32():
    model = make_model().requires_grad_(False).bfloat16()
    hidden, targets = states()
    half = hidden.detach().bfloat16().requires_grad_()
    nll = supervised_nll(model, half, targets)
    assert nll.dtype == torch.float32
    nll.sum().backward()
    expected = torch.nn.functional.cross_entropy(
        logits_of(model, half.detach()[None])[0].float(), targets, reduction="none"
    )
    assert torch.equal(nll, expected) and half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()


def test_a_model_that_hides_its_layers_is_refused():
    model = make_model()
    model.get_decoder = lambda: torch.nn.Identity()
    with pytest.raises(
        RuntimeError, match="model must run its layers through Identity, which LlamaForCausalLM does not"
    ):
        logits_of(model, states()[0][None])
