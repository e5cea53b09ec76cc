"""Which language the words near a prompt are told as, beside what the words near random prompts are told as."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .common import Result, check_installed
from .words import script, token_text


# Fewer distinct words are told as anything.
LEAST_WORDS = 5
LISTED = 3
_TIED = 1e-9
# What py3langid calls text that is in no language.
NO_LANGUAGE = "zxx"
# Scripts that put no space before a word.
_UNSPACED = {"Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}
_MARKED = re.compile("[\u0120\u2581]")  # what byte-level and SentencePiece tokenizers write for a space


@functools.cache
def _identifier() -> Any:
    check_installed("telling languages", ["py3langid"])
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def word_reader(tokenizer: Any) -> Callable[[int], str | None]:
    """A function from a token's id to the word that it is or begins, or None.

    A word is letters only after a space, which tokenizers of words (WordPiece's `##` aside) and scripts without spaces
    don't write. Of a longer word, cut into tokens, it is the beginning.
    """
    spaced = any(map(_MARKED.match, tokenizer.get_vocab()))

    @functools.cache
    def word(token_id: int) -> str | None:
        text = token_text(tokenizer, token_id)
        found = text.strip()
        if not found or any(unicodedata.category(character)[0] not in "LM" for character in found):
            return None
        return found if not spaced or text[0] == " " or script(found) in _UNSPACED else None

    return word


def language_probabilities(words: Sequence[str]) -> dict[str, float] | None:
    """How probable each language is of distinct words, each counted once: a collapsed prompt repeats its few.

    Naive Bayes over bytes (Lui & Baldwin 2012), by py3langid's model of 139 languages, which gives `zxx` to what is in
    none.

    Args:
        words: In their order.

    Returns:
        Probabilities by ISO 639 code, the likeliest first; None for fewer than `LEAST_WORDS` distinct words.
    """
    distinct = list(dict.fromkeys(words))
    return dict(_identifier().rank(" ".join(distinct))) if len(distinct) >= LEAST_WORDS else None


@dataclass(frozen=True, eq=False)
class LanguageSignal(Result):
    """The language that a prompt's nearest words are told as, and whether chance, start and prior explain it.

    Attributes:
        num_words: Distinct words among the nearest tokens.
        likeliest: Up to three of `{code, probability}`, the likeliest first; None where there are too few words.
        initial_likeliest: The same of the initial prompt, or None.
        same_share: Share of the draws whose likeliest language is the same; None without one.
        p_value: Against the draws, whichever the language is; None without one.
        inherited: The start, or the prior's centre, is told as the same, no less surely.
        signal: `p_value <= level` and not inherited.
        reason: Why there is no likeliest language, or None.
    """

    num_words: int
    likeliest: list[dict[str, Any]] | None
    initial_likeliest: list[dict[str, Any]] | None
    same_share: float | None
    p_value: float | None
    inherited: bool
    signal: bool
    reason: str | None


def language_signal(
    words: Sequence[str],
    draws: Sequence[Sequence[str]],
    initial: Sequence[str] | None = None,
    level: float = 0.05,
    centre: Sequence[str] = (),
) -> LanguageSignal:
    """Whether a prompt's words are told as a language more surely than random prompts explain.

    The share of draws told as the same language is no test alone: there are so many languages that random prompts are
    often told as a rare one. What is compared is how far the likeliest language's probability exceeds that language's
    mean over draws and prompt (-1 for `zxx` and for too few words). A prompt drawn from the prior is exchangeable with
    the draws, so it shows signal with probability `level` at most.

    Args:
        words: Near the prompt, one for each virtual token that has one.
        draws: The same of prompts drawn from its prior.
        initial: The same of the initial prompt, if known.
        level: Of signal.
        centre: Words near the prior's location at each virtual token.
    """
    count, found = len(set(words)), language_probabilities(words)
    before = None if initial is None else language_probabilities(initial)
    if found is None:
        reason = f"of the {LEAST_WORDS} distinct words that are needed the nearest tokens have {count or 'none'}"
        return LanguageSignal(count, None, _listed(before), None, None, False, False, reason)
    told = [*map(language_probabilities, draws), found]
    likeliest = [next(iter(one)) if one else None for one in told]
    means: Counter[str] = Counter()
    for one in told:
        means.update({code: p / len(told) for code, p in (one or {}).items()})
    excess = [
        -1.0 if one is None or code is None or code == NO_LANGUAGE else one[code] - means[code]
        for one, code in zip(told, likeliest, strict=True)
    ]
    code = next(iter(found))
    p_value = sum(value >= excess[-1] - _TIED for value in excess) / len(told)
    given = filter(None, (before, language_probabilities(centre)))
    inherited = any(next(iter(one)) == code and one[code] >= found[code] for one in given)
    return LanguageSignal(
        num_words=count,
        likeliest=_listed(found),
        initial_likeliest=_listed(before),
        same_share=likeliest[:-1].count(code) / len(draws),
        p_value=p_value,
        inherited=inherited,
        signal=p_value <= level + _TIED and not inherited,
        reason=None,
    )


def _listed(probabilities: dict[str, float] | None) -> list[dict[str, Any]] | None:
    if probabilities is None:
        return None
    return [{"code": code, "probability": p} for code, p in list(probabilities.items())[:LISTED]]
