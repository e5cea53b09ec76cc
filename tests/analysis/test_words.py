"""Tokens shown so that nothing is invisible; scripts; log-odds against their closed form."""

import math
import os

import pytest
from conftest import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from priors_peft.analysis.words import (
    count_words,
    over_represented,
    script,
    script_shares,
    show,
    show_token,
    token_text,
)


def byte_level(texts: list[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with these pieces and a special token after them."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    pieces = ["".join(letters[byte] for byte in text) for text in texts]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b" the", "␣the"),
        (b"\n\n\t", "␊␊␉"),
        (b"\x00\x7f", "␀␡"),
        ("привет".encode(), "привет"),
        (" 你好".encode(), "␣你好"),
        ("مرحبا".encode(), "مرحبا"),
        ("你".encode()[:2], "<0xE4><0xBD>"),
        (b"a" + "é".encode()[1:] + b"b", "a<0xA9>b"),
        (b"<script>", "<script>"),
        ("\u200b\u00a0".encode(), "<U+200B><U+00A0>"),
        ("\u0301".encode(), "\u25cc\u0301"),
        (b"\\n", "\\n"),
    ],
)
def test_byte_level_tokens_show_what_they_are(text, shown):
    assert show_token(byte_level([text]), 0) == shown


def test_every_byte_is_shown_visibly_and_as_no_other():
    tokenizer = byte_level([bytes([byte]) for byte in range(256)])
    shown = [show_token(tokenizer, byte) for byte in range(256)]
    assert len(set(shown)) == 256
    assert all(text.isprintable() and text.strip() for text in shown)


def test_special_tokens_are_their_names_and_missing_ids_are_unused():
    tokenizer = byte_level([b"a"])
    assert show_token(tokenizer, tokenizer.eos_token_id) == "<|end|>"
    assert show_token(tokenizer, 12345) == "<unused_12345>"
    assert show_token(make_tokenizer(), 4) == "Question:"
    assert show("") == "<empty>"


@pytest.mark.skipif("PRIORS_PEFT_TINY_MODEL" not in os.environ, reason="set PRIORS_PEFT_TINY_MODEL to a real model")
def test_tokens_of_sentencepiece_keep_their_space_and_bytes():
    tokenizer = AutoTokenizer.from_pretrained(os.environ["PRIORS_PEFT_TINY_MODEL"])
    assert show_token(tokenizer, 13) == "<0x0A>"
    assert token_text(tokenizer, tokenizer.convert_tokens_to_ids("▁do")) == " do"
    assert show_token(tokenizer, tokenizer.convert_tokens_to_ids("▁do")) == "␣do"
    assert show_token(tokenizer, 1) == "<s>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", "Latin"),
        ("naïve", "Latin"),
        ("привет", "Cyrillic"),
        ("你好", "Han"),
        ("々", "Han"),
        ("ひらがな", "Hiragana"),
        ("カタカナー", "Katakana"),
        ("ﾊﾛｰ", "Katakana"),
        ("한국어", "Hangul"),
        ("مرحبا", "Arabic"),
        ("שלום", "Hebrew"),
        ("हिन्दी", "Devanagari"),
        ("ಕನ್ನಡ", "Kannada"),
        ("𐌀", "Old Italic"),
        ("𝔸𝒷ｃ", "Latin"),
        ("aя", "Latin"),
        ("яa", "Cyrillic"),
        ("x2", "Latin"),
        (" 42", "Digits"),
        ("...", "Punctuation"),
        ("😀", "Symbols"),
        ("€", "Symbols"),
        ("  \n", "Space"),
        ("\x00", "Control"),
        ("<0xE4>", "Bytes"),
        ("a<0xE4>", "Latin"),
        ("", "Empty"),
    ],
)
def test_the_script_is_that_of_most_letters(text, expected):
    assert script(text) == expected


def test_shares_of_scripts_sum_to_one_whatever_the_order():
    texts = ["the", "of", "42", "привет"]
    assert script_shares(texts) == {"Latin": 0.5, "Cyrillic": 0.25, "Digits": 0.25} == script_shares(reversed(texts))
    with pytest.raises(ValueError, match="texts must not be empty"):
        script_shares([])


def test_a_prompt_counts_a_word_once_without_case_and_spaces():
    assert count_words([[" The", "the", "cat", " "], ["THE", "dog"]]) == {"cat": 1, "dog": 1, "the": 2}


def test_log_odds_are_those_of_the_closed_form():
    found = over_represented({"a": 8, "b": 2}, {"a": 10, "b": 20, "c": 10}, prior_strength=5)
    assert found.words == ["a", "c", "b"]
    prior = {"a": 5 * 18 / 50, "b": 5 * 22 / 50, "c": 5 * 10 / 50}
    for word, one, other, log_odds, z in zip(
        found.words, (8, 0, 2), (10, 10, 20), found.log_odds.tolist(), found.z.tolist(), strict=True
    ):
        here, there = one + prior[word], other + prior[word]
        expected = math.log(here / (15 - here)) - math.log(there / (45 - there))
        assert log_odds == pytest.approx(expected)
        assert z == pytest.approx(expected / math.sqrt(1 / here + 1 / there))


def test_swapped_groups_swap_signs_and_equal_groups_show_nothing():
    one, other = {"a": 8, "b": 2, "d": 1}, {"a": 3, "c": 9, "d": 1}
    forth, back = over_represented(one, other), over_represented(other, one)
    assert dict(zip(forth.words, forth.z.tolist(), strict=True)) == pytest.approx(
        {word: -z for word, z in zip(back.words, back.z.tolist(), strict=True)}
    )
    assert over_represented(one, one).z.abs().max() < 1e-12


def test_a_planted_word_comes_first_against_a_whole_vocabulary():
    vocabulary = {f"word{index}": 1 for index in range(10_000)}
    group = {"word17": 4, "word3": 1, "word5": 1, "word8": 1}
    found = over_represented(group, vocabulary)
    assert found.words[0] == "word17" and found.z[0] > 1.96
    assert found.to_dict()["counts"][0] == 4


def test_the_order_of_the_words_changes_nothing():
    one, other = {"a": 3, "b": 3, "c": 1}, {"d": 4, "a": 1, "b": 1}
    backwards = over_represented(dict(reversed(one.items())), dict(reversed(other.items())))
    assert over_represented(one, other).to_dict() == backwards.to_dict()


@pytest.mark.parametrize(
    ("counts", "background", "strength", "message"),
    [
        ({}, {"a": 1}, None, "counts must hold counts >= 0 of at least one word that occurs, got 0 words"),
        ({"a": 1}, {"a": 0}, None, "background must hold counts >= 0"),
        ({"a": 2, "b": -1}, {"a": 1}, None, "counts must hold counts >= 0"),
        ({"a": 1}, {"a": 1}, None, r"at least 2 words together, got \['a'\]"),
        ({"a": 1}, {"b": 1}, 0, "prior_strength must be > 0, got 0"),
    ],
)
def test_bad_counts_are_named(counts, background, strength, message):
    with pytest.raises(ValueError, match=message):
        over_represented(counts, background, strength)
