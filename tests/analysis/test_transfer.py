"""Transfer matrices: counted shares, similarities by hand, and a correlation whose p-value is what it says."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from priors_peft.analysis.transfer import (
    activation_overlap,
    prompt_similarities,
    transfer_correlation,
    transfer_summary,
)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_share_counts_transfers_that_beat_no_prompt():
    scores = torch.tensor([[0.9, 0.6, 0.5], [0.4, 0.8, 0.7], [0.6, 0.5, 0.4]])
    found = transfer_summary(scores, torch.tensor([0.5, 0.5, 0.5]))
    assert (found.wins, found.transfers, found.share) == (3, 6, 0.5)  # 0.6, 0.7, 0.6; a tie beats nothing
    assert found.own_share == pytest.approx(2 / 3)
    torch.testing.assert_close(found.gain_over_none, scores.double() - 0.5)
    torch.testing.assert_close(found.gain_over_own, scores.double() - scores.diagonal().double())
    losses = transfer_summary(-scores, torch.tensor([-0.5, -0.5, -0.5]), higher_is_better=False)
    assert losses.share == found.share and torch.equal(losses.gain_over_none, found.gain_over_none)


def test_prompts_of_one_task_are_no_transfers_of_it():
    scores = torch.tensor([[0.9, 0.6, 0.1], [0.7, 0.4, 0.1], [0.6, 0.8, 0.1]])
    found = transfer_summary(scores, torch.tensor([0.5, 0.5, 0.5]), own=[0, 0, 1])
    assert (found.wins, found.transfers, found.own_share) == (2, 6, 1.0)
    torch.testing.assert_close(found.gain_over_own[:, 0], torch.tensor([0.1, -0.1, -0.2]).double())
    assert found.gain_over_own[:, 2].isnan().all()
    assert found.to_dict()["gain_over_own"][0][2] is None


def test_similarities_are_highest_between_a_prompt_and_its_copy():
    prompt, order = rows(6, 16), torch.tensor([3, 1, 5, 0, 2, 4])
    prompts = torch.stack([prompt, prompt[order], rows(6, 16, seed=1)])
    found = prompt_similarities(prompts)
    assert found.keys() == {"frobenius", "cosine", "matched"}
    assert found["matched"][0, 1] == 0 and found["frobenius"][0, 1] < 0
    pairs = torch.nn.functional.cosine_similarity(prompts[0][:, None], prompts[2], dim=-1)
    assert found["cosine"][0, 2].item() == pytest.approx(pairs.mean().item(), abs=1e-6)
    assert found["cosine"][0, 1].item() == pytest.approx(found["cosine"][0, 0].item())
    assert found["frobenius"][0, 2].item() == pytest.approx(-(prompts[0] - prompts[2]).norm().item(), rel=1e-6)


def test_overlap_is_the_cosine_of_activation_patterns():
    active = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    expected = torch.tensor([[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(activation_overlap(active).float(), expected)
    torch.testing.assert_close(activation_overlap(active.view(4, 2, 2)), activation_overlap(active))


def test_rho_is_spearmans_over_ordered_pairs():
    similarity, transfer = rows(5, 5), rows(5, 5, seed=1)
    different = ~torch.eye(5, dtype=torch.bool)
    found = transfer_correlation(similarity, transfer)
    assert found.rho == pytest.approx(stats.spearmanr(similarity[different], transfer[different]).statistic)
    assert (found.num_pairs, found.num_permutations, found.exact) == (20, 120, True)


def test_the_p_value_counts_all_relabellings():
    similarity, transfer = rows(4, 4), rows(4, 4, seed=1)
    similarity = similarity + similarity.mT
    different = ~np.eye(4, dtype=bool)
    found = transfer_correlation(similarity, transfer)
    null = []
    for label in itertools.permutations(range(4)):
        turned = similarity.numpy()[np.ix_(label, label)]
        null.append(abs(stats.spearmanr(turned[different], transfer.numpy()[different]).statistic))
    assert found.p_value == np.mean(np.array(null) >= abs(found.rho) - 1e-9)


def test_planted_transfer_is_found_and_its_interval_holds_it():
    places = rows(8, 3)
    similarity = -torch.cdist(places, places)
    transfer = similarity + 0.1 * rows(8, 8, seed=1)
    found = transfer_correlation(similarity, transfer, num_permutations=999)
    assert found.rho > 0.9 and found.p_value == 0.001 and not found.exact
    assert 0.8 < found.interval[0] <= found.rho <= found.interval[1] <= 1


@pytest.mark.parametrize("seeds", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_unrelated_similarities_are_found_at_the_stated_level(seeds):
    """Prompts of one task resemble each other, and so does what they do elsewhere; that is no evidence."""
    own, trials, found = np.repeat(np.arange(6), seeds), 300, 0
    for trial in range(trials):
        places = rows(6, 2, seed=2 * trial)[own] + 0.1 * rows(6 * seeds, 2, seed=2 * trial + 1)
        skill = rows(6, 6, seed=10_000 + trial)[own] + 0.1 * rows(6 * seeds, 6, seed=20_000 + trial)
        result = transfer_correlation(-torch.cdist(places, places), skill, own.tolist(), 199, num_resamples=1)
        found += result.p_value <= 0.05
    # 5 % of 300 are expected, with a standard deviation of 3.8.
    assert 15 - 12 <= found <= 15 + 12


def test_the_order_of_the_prompts_and_the_seed_change_nothing_that_is_exact():
    similarity, transfer, order = rows(5, 5), rows(5, 5, seed=1), torch.tensor([4, 2, 0, 1, 3])
    one = transfer_correlation(similarity, transfer)
    other = transfer_correlation(similarity[order][:, order], transfer[order][:, order], seed=1)
    assert one.rho == pytest.approx(other.rho) and one.p_value == other.p_value
    assert transfer_correlation(similarity, transfer).to_dict() == one.to_dict()


def test_a_similarity_that_does_not_vary_has_no_correlation():
    found = transfer_correlation(torch.ones(4, 4), rows(4, 4))
    assert math.isnan(found.rho) and math.isnan(found.p_value) and found.num_resamples == 0
    assert found.to_dict()["rho"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transfer_summary(rows(3, 4), rows(4)), "own must say which of the 4 tasks each of the 3 prompts"),
        (lambda: transfer_summary(rows(3, 3), rows(2)), "no_prompt must have a score for each of the 3 tasks"),
        (lambda: transfer_summary(rows(2, 2), rows(2), own=[0, 2]), "own must hold 2 columns between 0 and 1"),
        (lambda: transfer_summary(rows(2, 1), rows(1), own=[0, 0]), "at least one task that a prompt was not trained"),
        (lambda: transfer_summary(rows(2, 2) / 0, rows(2)), "scores must be finite"),
        (lambda: prompt_similarities(rows(1, 3, 4)), "the number of prompts must be an integer >= 2, got 1"),
        (lambda: activation_overlap(rows(3, 4)), "active must be a boolean tensor .* got torch.float32"),
        (lambda: activation_overlap(torch.ones(1, 4).bool()), "the number of prompts must be an integer >= 2"),
        (lambda: transfer_correlation(rows(3, 4), rows(3, 3)), r"similarity must have shape \[3, 3\]"),
        (lambda: transfer_correlation(rows(2, 2), rows(2, 2)), "the number of tasks with prompts must be .* >= 3"),
        (lambda: transfer_correlation(rows(4, 4), rows(4, 3), [0, 0, 1, 2]), r"each task as often, got \[2, 1, 1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
