"""Nearest tokens: exact, whatever the chunks; signal at the stated level and no more."""

import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from priors_peft.analysis.tokens import (
    METRICS,
    NearestTokens,
    best_scores,
    best_tokens,
    nearest_tokens,
    token_changes,
    token_signal,
)
from priors_peft.priors import StructuredPrior


V, D, P = 300, 16, 6


def rows(count: int, seed: int = 0, width: int = D) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def brute_force(prompt: torch.Tensor, vocabulary: torch.Tensor, metric: str) -> torch.Tensor:
    prompt, vocabulary = prompt.double(), vocabulary.double()
    if metric == "cosine":
        return torch.nn.functional.cosine_similarity(prompt[:, None], vocabulary, dim=-1)
    return prompt @ vocabulary.mT if metric == "dot" else -(prompt[:, None] - vocabulary).norm(dim=-1)


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_tokens_are_those_of_every_pair_compared(metric):
    prompt, vocabulary = rows(P, 1), rows(V)
    expected = brute_force(prompt, vocabulary, metric)
    found = nearest_tokens(prompt, vocabulary, k=12, metric=metric)
    best = expected.topk(12)
    torch.testing.assert_close(found.scores, best.values)
    assert torch.equal(found.ids, best.indices)
    torch.testing.assert_close(best_scores(prompt, vocabulary, metric), best.values[:, 0])
    torch.testing.assert_close(best_tokens(prompt, vocabulary, metric)[1], best.indices[:, 0])


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_a_prompt_made_of_vocabulary_rows_names_those_rows(metric):
    vocabulary, ids = rows(V), torch.tensor([7, 0, 299, 7, 150, 42])
    found = nearest_tokens(vocabulary[ids], vocabulary, metric=metric)
    assert torch.equal(found.ids[:, 0], ids)
    torch.testing.assert_close(found.scores[:, 0], torch.full((P,), 1.0 if metric == "cosine" else 0.0).double())


@pytest.mark.parametrize("metric", METRICS)
def test_the_chunk_size_changes_nothing_not_even_among_equal_rows(metric):
    prompt, vocabulary = rows(P, 1), rows(V)
    vocabulary[100:200] = vocabulary[100]  # a hundred copies, as unused rows are
    prompt[0] = vocabulary[100] * 1.01
    excluded = [3, 101, 250]
    expected = nearest_tokens(prompt, vocabulary, k=40, metric=metric, excluded=excluded)
    for size in (1, 7, 64, 299, 1000):
        found = nearest_tokens(prompt, vocabulary, k=40, metric=metric, excluded=excluded, chunk_size=size)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.scores, expected.scores)
        scores = best_scores(prompt, vocabulary, metric, excluded, chunk_size=size)
        torch.testing.assert_close(scores, expected.scores[:, 0], rtol=1e-7, atol=1e-7)
    copies = [token for token in expected.ids[0].tolist() if 100 <= token < 200]
    assert copies == [100, *range(102, 102 + len(copies) - 1)]


def test_each_virtual_token_is_looked_up_on_its_own_in_any_order():
    prompt, vocabulary = rows(P, 1), rows(V)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    expected, found = nearest_tokens(prompt, vocabulary), nearest_tokens(prompt[order], vocabulary)
    assert torch.equal(found.ids, expected.ids[order]) and torch.equal(found.scores, expected.scores[order])
    stacked = best_scores(torch.stack([prompt, prompt[order]]), vocabulary)
    torch.testing.assert_close(stacked, torch.stack([expected.scores[:, 0], expected.scores[order, 0]]))


def test_excluded_rows_are_never_named():
    vocabulary = rows(V)
    found = nearest_tokens(vocabulary[:P], vocabulary, k=V - P, excluded=range(P))
    assert not (found.ids < P).any()
    assert best_scores(vocabulary[:P], vocabulary, excluded=range(P)).max() < 0.99


def test_half_precision_vocabularies_are_compared_in_full():
    vocabulary = rows(V).bfloat16()
    found = nearest_tokens(vocabulary[:P].float(), vocabulary)
    torch.testing.assert_close(found.scores[:, 0], torch.ones(P).double())


def test_random_prompts_from_the_prior_show_signal_at_the_stated_level():
    """Whether the virtual tokens share one distribution or lie at locations of their own."""
    vocabulary = rows(60, width=8)
    generator = torch.Generator().manual_seed(3)
    places = 3 * torch.randn(P, 8, generator=generator)
    for loc in (torch.zeros(P, 8), places):
        shown, trials = 0, 500
        for _ in range(trials):
            drawn = loc + torch.randn(40, P, 8, generator=generator)
            scores = best_scores(drawn, vocabulary)
            nearest = nearest_tokens(drawn[0], vocabulary, k=1)
            shown += bool(token_signal(nearest, scores[1:], level=0.05).signal.any())
        # Exactly 5 % of 500 are expected, with a standard deviation of 4.9.
        assert 25 - 15 <= shown <= 25 + 15


@pytest.mark.skipif("PRIORS_PEFT_TINY_MODEL" not in os.environ, reason="set PRIORS_PEFT_TINY_MODEL to a real model")
def test_random_prompts_show_signal_at_the_stated_level_on_a_real_vocabulary():
    model = AutoModelForCausalLM.from_pretrained(os.environ["PRIORS_PEFT_TINY_MODEL"])
    vocabulary = model.get_input_embeddings().weight.detach().float()
    prior, generator = StructuredPrior.fit(vocabulary), torch.Generator().manual_seed(0)
    drawn = torch.stack([prior.sample(P, generator) for _ in range(200 * 20)]).view(200, 20, P, -1)
    scores = best_scores(drawn, vocabulary)
    shown = 0
    for prompt, others in zip(drawn[:, 0], scores[:, 1:], strict=True):
        shown += bool(token_signal(nearest_tokens(prompt, vocabulary, k=1), others, level=0.05).signal.any())
    # Exactly 5 % of 200 are expected, with a standard deviation of 3.1.
    assert 10 - 9 <= shown <= 10 + 9


def test_planted_tokens_are_signal_and_the_others_are_not():
    vocabulary, draws = rows(V), 0.5 * rows(200 * P, 2).view(200, P, D)
    prompt, initial = draws[0].clone(), draws[1]
    prompt[[1, 4]] = vocabulary[[17, 99]] + 0.05 * rows(2, 5)
    start = nearest_tokens(initial, vocabulary)
    found = token_signal(nearest_tokens(prompt, vocabulary), best_scores(draws[2:], vocabulary), start)
    assert found.signal.tolist() == [False, True, False, False, True, False]
    assert (found.prior_percentile[[1, 4]] == 100).all() and (found.initial_percentile[[1, 4]] == 100).all()
    assert found.p_values[1] == 1 / 199
    assert found.prior_band.shape == (2, P) and (found.prior_band[0] < found.prior_band[1]).all()


def test_a_restless_virtual_token_does_not_hide_what_a_calm_one_shows():
    draws = rows(199, width=P) * torch.tensor([0.01, 1, 1, 1, 1, 100])
    scores = torch.tensor([0.08, 0, 0, 0, 0, 0])[:, None]
    found = token_signal(NearestTokens(torch.zeros(P, 1).long(), scores.double(), "dot"), draws)
    assert found.signal.tolist() == [True, False, False, False, False, False]


def test_what_the_start_had_already_is_inherited_and_no_signal():
    vocabulary, null = rows(V), best_scores(0.5 * rows(200 * P, 2).view(200, P, D), rows(V))
    initial = vocabulary[:P] + 0.3 * rows(P, 3)
    start = nearest_tokens(initial, vocabulary)
    untouched = token_signal(start, null, start)
    assert untouched.inherited.all() and not untouched.signal.any()
    closer = initial.clone()
    closer[2] = vocabulary[2]
    closer[3] = vocabulary[50]
    found = token_signal(nearest_tokens(closer, vocabulary), null, start)
    assert found.signal.tolist() == [False, False, True, True, False, False]


def test_a_prior_without_spread_gives_no_signal_by_rounding():
    vocabulary = rows(V)
    null = best_scores(vocabulary[:P].expand(200, P, D), vocabulary, chunk_size=7)
    found = token_signal(nearest_tokens(vocabulary[:P], vocabulary), null)
    assert (found.p_values == 1).all()
    torch.testing.assert_close(found.prior_percentile, torch.full((P,), 50.0).double())


def test_the_order_of_the_draws_changes_nothing():
    vocabulary, draws = rows(V), rows(50 * P, 2).view(50, P, D)
    nearest, null = nearest_tokens(rows(P, 9), vocabulary), best_scores(draws, vocabulary)
    one, other = token_signal(nearest, null), token_signal(nearest, null.flip(0))
    assert torch.equal(one.p_values, other.p_values)
    assert torch.equal(one.prior_percentile, other.prior_percentile)


def test_tokens_kept_gained_lost_and_moved():
    def nearest(*ids: list[int]) -> NearestTokens:
        return NearestTokens(torch.tensor(ids), torch.zeros(len(ids), len(ids[0])), "cosine")

    changes = token_changes(nearest([1, 2, 3], [4, 5, 6]), nearest([3, 1, 9], [4, 2, 8]))
    assert changes.kept == [[3, 1], [4]]
    assert changes.gained == [[9], [2, 8]]
    assert changes.lost == [[2], [5, 6]]
    assert changes.moved.tolist() == [True, False]
    assert changes.kept_anywhere == [1, 2, 3, 4]
    assert changes.to_dict()["moved"] == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "euclid"}, "metric must be one of cosine, l2, dot, got 'euclid'"),
        ({"k": 0}, "k must be an integer >= 1, got 0"),
        ({"k": V + 1}, f"k must be at most the {V} vocabulary rows that are not excluded, got {V + 1}"),
        ({"excluded": [V]}, "excluded must be ids of the vocabulary's 300 rows"),
        ({"excluded": range(V)}, "excluded must leave rows of the vocabulary, got all 300"),
        ({"prompt": rows(P, width=8)}, "prompt must be as wide as vocabulary, got widths 8 and 16: .*same base model"),
        ({"prompt": rows(P).view(2, 3, D)}, r"prompt must be .* shape \[P, d\].*got torch.float32 \[2, 3, 16\]"),
        ({"prompt": torch.empty(0, D)}, "prompt must be .* not empty"),
        ({"prompt": rows(P) / 0}, "prompt must be finite, got 6 of 6 vectors"),
        ({"chunk_size": 0}, "chunk_size must be an integer >= 1, got 0"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        nearest_tokens(**{"prompt": rows(P), "vocabulary": rows(V)} | change)


def test_too_few_draws_for_the_level_are_refused():
    nearest = nearest_tokens(rows(P), rows(V))
    token_signal(nearest, rows(19, width=P))
    with pytest.raises(ValueError, match="draw_scores must hold at least 19 draws .* level 0.05, got 18"):
        token_signal(nearest, rows(18, width=P))
    with pytest.raises(ValueError, match="one column for each of the 6 virtual tokens, got 5"):
        token_signal(nearest, rows(50, width=5))
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 5"):
        token_signal(nearest, rows(50, width=P), level=5)
    with pytest.raises(ValueError, match="initial must be in the metric 'cosine' of nearest, got 'dot'"):
        token_signal(nearest, rows(50, width=P), nearest_tokens(rows(P), rows(V), metric="dot"))


@pytest.mark.slow
def test_a_quarter_of_a_million_rows_take_less_than_a_gigabyte_more():
    program = """
import resource, torch
from priors_peft.analysis.tokens import best_scores, nearest_tokens
torch.set_num_threads(1)
vocabulary, draws = torch.randn(250_000, 1024), torch.randn(20, 20, 1024)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for metric in ("cosine", "l2", "dot"):
    nearest_tokens(draws[0], vocabulary, metric=metric, excluded=[0, 1000, 7])
best_scores(draws, vocabulary, excluded=[0, 1000, 7])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert 0 < kilobytes < 2**20
