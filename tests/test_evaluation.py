"""Answers and their likelihood are each row's own, whatever rows they share a batch with."""

import pytest
import torch
from conftest import make_model, make_tokenizer
from datasets import Dataset
from test_model import TOKENS, stock_twin

from priors_peft import PriorConfig, get_prior_model
from priors_peft.data import IGNORED
from priors_peft.evaluation import answer


CONFIG = {"prior": "gaussian", "num_virtual_tokens": TOKENS}
ROWS = [
    {"prompt": "1 " * length + str(length), "completion": " 5" * (1 + length % 3)}
    for length in (2, 9, 4, 4, 7, 1, 12, 9)
]  # fmt: skip


def counted(model, monkeypatch):
    """The number of rows of each call of `generate`."""
    seen, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **given: seen.append(len(given["input_ids"])) or generate(**given), raising=False
    )
    return seen


@pytest.mark.parametrize("kind", ["ours", "stock", "base"])
def test_a_batch_gives_what_its_rows_give_alone(architecture, kind, monkeypatch):
    tokenizer, model = make_tokenizer(), make_model(architecture)
    ours = get_prior_model(model, PriorConfig(**CONFIG))
    if kind == "stock":
        model = stock_twin(architecture, ours.prompt_encoder["default"]()[0].detach())
    model = (ours if kind == "ours" else model).eval()
    alone, sizes = answer(model, tokenizer, ROWS, 3, batch_size=1), counted(model, monkeypatch)
    together = answer(model, tokenizer, ROWS, 3, batch_size=4)
    # Stock PEFT does not allow for padding before an answer.
    assert sizes == ([4, 4] if kind == "ours" else [1, 1, 2, 1, 2, 1])
    assert together.nll == pytest.approx(alone.nll, rel=1e-5)
    assert together.predictions == alone.predictions and len(set(alone.predictions)) > 1


def test_rows_that_fit_the_context_alone_need_not_fit_it_together():
    tokenizer, model = make_tokenizer(), get_prior_model(make_model("gpt2"), PriorConfig(**CONFIG))
    rows = [{"prompt": "1 " * 100, "completion": " 5"}, {"prompt": "1", "completion": " 6" * 100}]
    alone, together = (answer(model, tokenizer, rows, 3, batch_size=size) for size in (1, 2))
    assert together.nll == pytest.approx(alone.nll, rel=1e-5) and together.predictions == alone.predictions


def test_a_first_token_with_nothing_before_it_is_not_scored():
    tokenizer, model = make_tokenizer(), get_prior_model(make_model(), PriorConfig(**CONFIG)).eval()
    rows = [{"input_ids": ids, "attention_mask": [1] * 4, "labels": ids} for ids in ([5, 6, 7, 8], [9, 6, 7, 8])]
    with torch.no_grad():
        outputs = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([[IGNORED, *row["labels"][1:]]]))
            for row in rows
        ]
    expected = sum(output.row_nll.item() for output in outputs) / 6
    for size in (1, 2):
        assert answer(model, tokenizer, Dataset.from_list(rows), 3, size).nll == pytest.approx(expected, rel=1e-5)
