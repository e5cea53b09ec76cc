"""Loss and gradient are those of stock PEFT's rows alone, whatever the padding, the lengths and the way through."""

import copy

import pytest
import torch
from conftest import CONFIGS, VOCABULARY, WIDTH, make_model, pairwise
from peft import PromptTuningConfig, get_peft_model
from test_model import assert_close, without_dropout
from transformers import AutoModelForCausalLM, MistralConfig, NemotronConfig

from priors_peft import PriorConfig, get_prior_model, packing
from priors_peft.batch import Supervision, Text
from priors_peft.model import PriorPeftModel
from priors_peft.packing import Layout, Stretch, pack


LENGTHS = {"uneven": (4, 9, 6), "equal": (5, 5, 5), "some equal": (5, 9, 5, 9, 1), "one": (7,), "short": (1, 3, 12)}


def rows(lengths, common=0, seed=1):
    """Unpadded rows whose second half is supervised and whose first `common` tokens are alike."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    for row in drawn:
        row[:common] = drawn[0][:common]
    return [(row, torch.where(torch.arange(len(row)) >= len(row) // 2, row, -100)) for row in drawn]


def padded(rows, side):
    longest = max(len(ids) for ids, _ in rows)
    parts = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in rows:
        fill = longest - len(ids)
        width = (fill, 0) if side == "left" else (0, fill)
        for name, part, value in (
            ("input_ids", ids, 0),
            ("attention_mask", torch.ones_like(ids), 0),
            ("labels", labels, -100),
        ):
            parts[name].append(torch.nn.functional.pad(part, width, value=value))
    return {name: torch.stack(part) for name, part in parts.items()}


def stock_on_each_row(model, prompt, rows):
    """Summed loss and prompt gradient of stock PEFT, which sees one row at a time and so no padding."""
    stock = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt)))
    weight = stock.prompt_encoder["default"].embedding.weight
    weight.data.copy_(prompt)
    total = 0.0
    for ids, labels in rows:
        inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "labels": labels[None]}
        loss = stock(**inputs).loss * (labels != -100).sum()
        loss.backward()
        total += loss.detach()
    return total, weight.grad


def ours_on(model, batches, items, **options):
    """Summed loss and gradient over micro-batches."""
    losses = [model(**batch, num_items_in_batch=items, **options).loss for batch in batches]
    sum(losses).backward()
    return sum(losses).detach(), model.prompt_encoder["default"].coordinate.grad[0]


def tuned(model, count):
    config = PriorConfig(prior="gaussian", num_virtual_tokens=count, coordinates="plain", prior_weight=0.0)
    return get_prior_model(model, config).train()


WAYS = ["packed by length", "packed at once", "padded"]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    if request.param == "padded":
        monkeypatch.setattr(PriorPeftModel, "packs", lambda self, training: False)
    if request.param == "packed at once":  # as on an accelerator
        monkeypatch.setattr(packing, "_by_length", packing._at_once)
    return request.param


@pytest.mark.parametrize(
    "architecture, way, side, lengths, count, accumulation",
    pairwise(CONFIGS, WAYS, ["left", "right"], LENGTHS, [1, 6], [1, 2]),
    indirect=["way"],
)
def test_loss_and_gradient_are_those_of_stocks_rows_alone(architecture, way, side, lengths, count, accumulation):
    model = tuned(make_model(architecture), count)
    without_dropout(model)
    assert model.packs(training=True) == (way != "padded" and architecture != "bloom")
    texts = rows(LENGTHS[lengths], common=2 if lengths == "uneven" else 0)
    prompt = model.prompt_encoder["default"]()[0].detach()
    expected, expected_gradient = stock_on_each_row(make_model(architecture), prompt, texts)
    parts = [texts] if accumulation == 1 else [texts[:1], texts[1:] or texts[:0]]
    batches = [padded(part, side) for part in parts if part]
    items = sum(int((labels != -100).sum()) for _, labels in texts)
    loss, gradient = ours_on(model, batches, items)
    assert abs(loss - expected / items) < 1e-5
    assert_close(gradient, expected_gradient / items, 1e-4)


@pytest.mark.parametrize("unsupervised", [[0], [0, 1, 2]])
def test_rows_without_labels_count_for_nothing(architecture, way, unsupervised):
    model, texts = tuned(make_model(architecture), 4), rows((4, 9, 6))
    without_dropout(model)
    kept = [text for index, text in enumerate(texts) if index not in unsupervised]
    expected, expected_gradient = 0.0, torch.zeros(4, WIDTH)
    if kept:
        prompt = model.prompt_encoder["default"]()[0].detach()
        expected, expected_gradient = stock_on_each_row(make_model(architecture), prompt, kept)
    for index in unsupervised:
        texts[index] = (texts[index][0], torch.full_like(texts[index][1], -100))
    loss, gradient = ours_on(model, [padded(texts, "left")], 1)
    assert abs(loss - expected) < 1e-4 and gradient.isfinite().all()
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


@pytest.mark.parametrize("name, attention", [("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager")])
def test_windows_shorter_than_the_prompt_are_kept(name, attention, way):
    config = copy.deepcopy(CONFIGS["gemma2"])
    if name == "mistral":
        config = MistralConfig(**CONFIGS["llama"].to_diff_dict() | {"model_type": "mistral"})
    config.sliding_window = 4
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model, texts = tuned(copy.deepcopy(base), 6), rows((4, 9, 6), common=2)
    expected, expected_gradient = stock_on_each_row(base, model.prompt_encoder["default"]()[0].detach(), texts)
    loss, gradient = ours_on(model, [padded(texts, "right")], 1)
    assert abs(loss - expected) < 1e-4
    assert_close(gradient, expected_gradient, 1e-4)
    with torch.no_grad(), model.eval().cached_prompt():
        for _ in range(2):
            again = model(**padded(texts, "right"), num_items_in_batch=1, return_logits=False)
            assert abs(again.loss - expected) < 1e-4


def test_deep_prompts_are_packed_too(architecture):
    config = PriorConfig(prior="gaussian", num_virtual_tokens=5, tuning="deep", layers=[0, -1], prior_weight=0.0)
    results = []
    for packs in (True, False):
        model = get_prior_model(make_model(architecture), config).train()
        without_dropout(model)
        if not packs:
            model.packs = lambda training: False
        loss = model(**padded(rows((4, 9, 6)), "right")).loss
        loss.backward()
        results.append((loss.detach(), model.prompt_encoder["default"].coordinate.grad))
    (loss, gradient), (other, expected) = results
    assert abs(loss - other) < 1e-5
    assert_close(gradient, expected, 1e-4)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_only_what_predicts_an_answer_is_computed():
    texts = rows((4, 9, 6), common=2)
    unsupervised = (texts[0][0], torch.full_like(texts[0][1], -100))
    batch = padded([*texts, unsupervised], "left")
    text = Text(batch["input_ids"], None, batch["attention_mask"], None)
    supervision = Supervision.of(batch["labels"], batch["attention_mask"])
    packed = pack(text, supervision, [(5, [0, 1, 2, 3])])
    # The last token of a row predicts nothing; a row without answers has nothing to predict, and nothing in common.
    assert [stretch.length for stretch in packed.stretches] == [5, 3, 5, 8]
    shared = pack(
        text.of([0, 1, 2]), Supervision.of(batch["labels"][:3], batch["attention_mask"][:3]), [(5, [0, 1, 2])]
    )
    assert [stretch.length for stretch in shared.stretches] == [5 + 2, 1, 3, 6]


def test_a_layout_serves_layers_on_several_devices():
    layout = Layout([Stretch(3), Stretch(2, 0), Stretch(4, 0)], 0)
    for device in ("cpu", "meta", "cpu"):
        like = torch.zeros(1, device=device)
        for part in (layout.triangle(None, like), layout.triangle(2, like), *layout.padded(None, like)):
            assert part.device.type == device


def test_positions_that_the_caller_gives_are_kept(way):
    model = tuned(make_model(), 4)
    batch = padded(rows((4, 9, 6)), "right")
    given = torch.arange(9).expand(3, -1)
    plain, _ = ours_on(model, [batch], 1)
    same, _ = ours_on(model, [batch | {"position_ids": given}], 1)
    # Rotary positions are relative: every other token counts for the distances.
    stretched, _ = ours_on(model, [batch | {"position_ids": 2 * given}], 1)
    assert abs(same - plain) < 1e-4 < abs(stretched - plain)


def test_embeddings_can_be_given_instead_of_ids(architecture, way):
    model = tuned(make_model(architecture), 4)
    without_dropout(model)
    batch = padded(rows((4, 9, 6), common=2), "right")
    expected, _ = ours_on(model, [batch], 1)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    assert abs(ours_on(model, [batch | {"inputs_embeds": embeddings}], 1)[0] - expected) < 1e-3


def test_evaluation_by_a_kept_prompt_gives_the_same_likelihood(architecture, way):
    model = tuned(make_model(architecture), 5).eval()
    batch = padded(rows((4, 9, 6), common=2), "right")
    first_only = batch | {"labels": torch.where(torch.arange(9) == 0, batch["input_ids"], -100)}
    for inputs in (batch, first_only):
        with torch.no_grad():
            expected = model(**inputs).row_nll
            with model.cached_prompt():
                for _ in range(2):
                    assert torch.allclose(model(**inputs, return_logits=False).row_nll, expected, rtol=1e-4, atol=1e-4)


def test_attention_is_the_models_own_again_afterwards():
    model = tuned(make_model(), 4)

    def fail(*arguments):
        assert model.base_model.config._attn_implementation == packing.NAME
        raise RuntimeError("a layer failed")

    hook = model.base_model.base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a layer failed"):
        ours_on(model, [padded(rows((4, 9)), "right")], 1)
    assert model.base_model.config._attn_implementation == "eager"
    hook.remove()
    ours_on(model, [padded(rows((4, 9)), "right")], 1)
    assert model.base_model.config._attn_implementation == "eager"


def test_a_model_with_a_layer_that_attends_by_itself_is_padded():
    model = tuned(make_model(), 4)
    texts = rows((4, 9, 6))
    expected, _ = stock_on_each_row(make_model(), model.prompt_encoder["default"]()[0].detach(), texts)
    attention = model.base_model.base_model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)  # it does not hear that it should attend by the layout
    assert model.packs(training=True)
    assert abs(ours_on(model, [padded(texts, "right")], 1)[0] - expected) < 1e-4
    assert not model.packs(training=True)


def test_architectures_that_hand_no_arguments_to_their_layers_are_packed():
    torch.manual_seed(0)
    config = NemotronConfig(**CONFIGS["llama"].to_diff_dict() | {"model_type": "nemotron"})
    base = AutoModelForCausalLM.from_config(config).eval()
    model, texts = tuned(copy.deepcopy(base), 4), rows((4, 9, 6), common=2)
    expected, expected_gradient = stock_on_each_row(base, model.prompt_encoder["default"]()[0].detach(), texts)
    loss, gradient = ours_on(model, [padded(texts, "left")], 1)
    assert model.packs(training=True) and abs(loss - expected) < 1e-4
    assert_close(gradient, expected_gradient, 1e-4)
