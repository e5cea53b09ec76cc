"""Faithfulness: hardened prompts are vocabulary rows, ablations touch one virtual token, rankings follow losses."""

import pytest
import torch

from priors_peft.analysis.faithfulness import ablations, harden, rank_ablations, waywardness
from priors_peft.analysis.tokens import nearest_tokens


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_prompt_made_of_vocabulary_rows_hardens_to_itself():
    vocabulary = rows(50, 8)
    prompt = vocabulary[[3, 40, 3]]
    near = prompt + 0.01 * rows(3, 8, seed=1)
    hard = harden(near, vocabulary, nearest_tokens(near, vocabulary).ids[:, 0])
    assert torch.equal(hard, prompt)
    assert torch.equal(harden(hard, vocabulary, nearest_tokens(hard, vocabulary).ids[:, 0]), hard)
    assert harden(near, vocabulary.bfloat16(), [3, 40, 3]).dtype == torch.float32


def test_waywardness_is_what_the_reading_loses_of_what_the_prompt_gains():
    found = waywardness(1.0, 1.75, no_prompt_loss=2.0)
    assert (found.lost, found.gained, found.lost_share) == (0.75, 1.0, 0.75)
    assert waywardness(1.0, 1.0, 2.0).lost_share == 0
    assert waywardness(1.0, 3.0, 2.0).lost_share == 2
    assert waywardness(1.0, 1.75).lost_share is None
    assert waywardness(2.0, 2.5, 2.0).lost_share is None


def test_each_ablation_replaces_one_virtual_token():
    prompt, loc = rows(4, 3), rows(3, seed=1)
    found = ablations(prompt, loc)
    assert found.shape == (4, 4, 3)
    for index in range(4):
        changed = (found[index] != prompt).any(-1).nonzero().flatten().tolist()
        assert changed == [index] and torch.equal(found[index, index], loc)
    own = rows(4, 3, seed=2)
    assert torch.equal(ablations(prompt, own)[torch.arange(4), torch.arange(4)], own)
    assert torch.equal(prompt, rows(4, 3))


def test_ablations_are_ranked_by_what_the_virtual_token_is_worth():
    found = rank_ablations(1.0, [1.5, 0.75, 2.0, 1.5])
    assert found.order.tolist() == [2, 0, 3, 1]
    assert found.importance.tolist() == [0.5, -0.25, 1.0, 0.5]
    assert found.to_dict()["loss"] == 1.0


def test_the_virtual_token_that_a_task_looks_at_comes_first():
    """A linear task whose loss hangs on one virtual token only."""
    prompt = rows(5, 4)

    def loss(theta: torch.Tensor) -> float:
        return float((theta[3] - prompt[3]).square().sum())

    found = rank_ablations(loss(prompt), [loss(each) for each in ablations(prompt, torch.zeros(4))])
    assert found.order[0] == 3 and found.importance[[0, 1, 2, 4]].abs().max() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: harden(rows(3, 4), rows(9, 5), [0, 1, 2]),
            "prompt must be as wide as vocabulary, got widths 4 and 5",
        ),
        (
            lambda: harden(rows(3, 4), rows(9, 4), [0, 1]),
            r"ids must be integers of shape \[3\].*got torch.int64 \[2\]",
        ),
        (lambda: harden(rows(3, 4), rows(9, 4), [0, 1, 9]), "ids must be rows of the vocabulary, 0 to 8, got 0 to 9"),
        (lambda: waywardness(1.0, float("inf")), "hard_loss must be finite, in nats per token"),
        (lambda: ablations(rows(3, 4), rows(5)), r"replacement must have shape \[4\] or \[3, 4\], got \[3, 5\]"),
        (lambda: rank_ablations(1.0, []), "the number of losses must be an integer >= 1, got 0"),
        (lambda: rank_ablations(1.0, [float("nan")]), "losses must be finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
