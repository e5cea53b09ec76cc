"""Metrics against values worked out by hand, and SQuAD's against the official script's rules."""

import pytest

from priors_peft.tasks.metrics import (
    completion_metrics,
    exact_match,
    first_line,
    macro_f1,
    squad_exact_match,
    squad_f1,
    squad_normalize,
    token_f1,
)


def test_exact_match_forgives_only_white_space_at_the_ends():
    assert exact_match([" 12 ", "-5", "A", "1 2"], ["12", "5", "a", "1  2"]) == 0.25


def test_token_f1_by_hand():
    # 2 common words of 3 and 4: 2 * 2 / 7. A word counts as often as it is in both.
    assert token_f1(["a b c"], ["a b d e"]) == pytest.approx(4 / 7)
    assert token_f1(["a a"], ["a"]) == pytest.approx(2 / 3)
    assert token_f1(["a a"], ["a a b"]) == pytest.approx(4 / 5)
    assert token_f1(["-5"], ["5"]) == 0.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat's  hat!", "cats hat"),
        ("an apple, a day", "apple day"),
        ("theory", "theory"),
        ("A-1", "a1"),
        ("the", ""),
    ],
)
def test_squad_normalization(text, normal):
    # Punctuation goes before articles, so "A-1" keeps its letter.
    assert squad_normalize(text) == normal


def test_squad_takes_the_best_of_several_answers():
    predictions = ["The Denver Broncos.", "in 1999"]
    references = [["Broncos", "Denver Broncos"], ["1999", "year 1999"]]
    assert squad_exact_match(predictions, references) == 0.5
    assert squad_f1(predictions, references) == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("metric", [exact_match, token_f1, squad_exact_match, squad_f1])
def test_means_stay_in_the_unit_interval(metric):
    assert metric(["x y", "", "the"], ["x y", "", "the"]) == 1.0
    assert metric(["x", "", "y"], ["z", "w", ""]) == 0.0


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lengths_must_agree(predictions, references):
    with pytest.raises(ValueError, match=f"got {len(predictions)} and {len(references)}"):
        exact_match(predictions, references)


def test_a_row_without_answers_is_named():
    with pytest.raises(ValueError, match="row 2"):
        squad_f1(["a", "b"], [["a"], []])


def test_completion_metrics_names():
    assert completion_metrics(["4"], ["4"]) == {"exact_match": 1.0, "f1": 1.0}


def test_first_line_is_the_answer():
    assert [first_line(text) for text in (" yes\nQuestion: x", "\n\n yes ", "", "\n")] == ["yes", "yes", "", ""]


def test_macro_f1_by_hand():
    # a: precision 1/2, recall 1 -> 2/3; b: recall 1/2, precision 1 -> 2/3; c occurs nowhere; "other" is no class.
    assert macro_f1(["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"]) == pytest.approx(2 / 3)
    assert macro_f1(["a", "other"], ["a", "a"], ["a", "b"]) == pytest.approx(2 / 3)
    # A class that is only predicted counts, with 0.
    assert macro_f1(["a", "b"], ["a", "a"], ["a", "b"]) == pytest.approx(1 / 3)
