"""Maximum mean discrepancy: its sum written out, unbiased, and a test of the right level."""

import math

import pytest
import torch

from priors_peft.analysis.discrepancy import median_distance, mmd_test, squared_mmd


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_discrepancy_is_the_sum_over_pairs_written_out():
    prompt, sample, bandwidth = rows(3, 4), rows(5, 4, seed=1), 1.7

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return math.exp(-float((x - y).square().sum()) / (2 * bandwidth**2))

    expected = sum(kernel(prompt[i], prompt[j]) for i in range(3) for j in range(3) if i != j) / 6
    expected += sum(kernel(sample[i], sample[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected -= 2 * sum(kernel(x, y) for x in prompt for y in sample) / 15
    assert squared_mmd(prompt, sample, bandwidth).item() == pytest.approx(expected)
    both = squared_mmd(torch.stack([prompt, sample[:3]]), sample, bandwidth)
    assert both[0].item() == pytest.approx(expected)


@pytest.mark.slow
def test_it_is_zero_on_average_where_both_come_from_one_distribution():
    found = squared_mmd(rows(4000, 5, 3), rows(2000, 3, seed=1), 1.5)
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(4000) + 1e-3
    assert found.min() < 0 < found.max()


def test_the_bandwidth_is_the_median_distance():
    sample = rows(50, 4)
    assert median_distance(sample) == pytest.approx(torch.pdist(sample).double().median().item(), rel=1e-6)


@pytest.mark.slow
def test_rows_of_the_vocabulary_are_found_different_at_the_stated_level():
    vocabulary, trials = rows(3000, 4), 400
    prompts = rows(trials, 5, 4, seed=1)
    p_values = torch.tensor([mmd_test(prompt, vocabulary, 60, 99, seed=i).p_value for i, prompt in enumerate(prompts)])
    # Exactly 5 % of 400 are expected, with a standard deviation of 4.4.
    assert 20 - 14 <= (p_values <= 0.05).sum() <= 20 + 14
    assert 0.45 < p_values.mean() < 0.56


def test_a_prompt_elsewhere_is_found_exactly_to_the_seed():
    vocabulary = rows(500, 4)
    found = mmd_test(rows(5, 4, seed=1) + 3, vocabulary, num_rows=100, num_permutations=99, seed=3)
    assert found.p_value == 0.01
    assert found.squared_mmd > found.null_band[1]
    again = mmd_test(rows(5, 4, seed=1) + 3, vocabulary, num_rows=100, num_permutations=99, seed=3)
    assert again.to_dict() == found.to_dict()
    assert found.num_rows == 100


def test_excluded_rows_are_not_drawn():
    vocabulary = rows(100, 4)
    vocabulary[:50] += 1000
    found = mmd_test(rows(5, 4, seed=1), vocabulary, excluded=range(50), num_permutations=20)
    assert found.num_rows == 50 and found.bandwidth < 10


def test_bad_input_is_named():
    vocabulary = rows(50, 4)
    with pytest.raises(ValueError, match="the number of virtual tokens must be an integer >= 2, got 1"):
        mmd_test(rows(1, 4), vocabulary)
    with pytest.raises(ValueError, match="bandwidth must be > 0, got 0.0: the sample's rows must not be all the same"):
        mmd_test(rows(3, 4), vocabulary[:1].expand(50, 4))
    with pytest.raises(ValueError, match="prompt must be as wide as sample, got widths 3 and 4"):
        squared_mmd(rows(3, 3), vocabulary, 1.0)
    with pytest.raises(ValueError, match="num_permutations must be an integer >= 1, got 0"):
        mmd_test(rows(3, 4), vocabulary, num_permutations=0)
    with pytest.raises(ValueError, match="count must be an integer >= 1, got 0"):
        mmd_test(rows(3, 4), vocabulary, num_rows=0)
