"""Tokens as people read them: shown so that nothing stays invisible, their scripts, and words said too often."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .common import Result


_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes with (Radford et al. 2019, `bytes_to_unicode`)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def token_text(tokenizer: Any, token_id: int) -> str:
    """The text a token stands for, its leading space included; bytes that are no whole character as `<0xE4>`.

    Special and added tokens are their own names, and ids that the tokenizer doesn't have are `<unused_123>`.
    """
    piece = tokenizer.convert_ids_to_tokens(int(token_id))
    if piece is None:
        return f"<unused_{int(token_id)}>"
    if int(token_id) in tokenizer.all_special_ids or int(token_id) in getattr(tokenizer, "added_tokens_decoder", {}):
        return piece
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    if "ByteLevel" in decoder and all(character in _BYTES for character in piece):
        text = bytes(_BYTES[character] for character in piece).decode("utf-8", errors="surrogateescape")
        return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in text)
    return piece.replace("\u2581", " ")


def show(text: str) -> str:
    """`text` with everything visible: spaces as ␣, control characters as ␊ and its like, hidden ones as `<U+200B>`.

    Letters of every script stay as they are; a mark that needs a letter to stand on gets a dotted circle.
    """
    shown = "".join(map(_visible, text))
    if text and unicodedata.category(text[0]).startswith("M"):
        shown = "\u25cc" + shown
    return shown or "<empty>"


def show_token(tokenizer: Any, token_id: int) -> str:
    """One token so that a person can read it: `show` of its `token_text`."""
    return show(token_text(tokenizer, token_id))


def _visible(character: str) -> str:
    code = ord(character)
    if code <= 0x20:
        return "\u2423" if code == 0x20 else chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")
    return f"<U+{code:04X}>" if hidden else character


# Scripts.

# First words of Unicode names that say nothing alone.
_TWO_WORDS = {"OLD", "NEW", "TAI", "LINEAR", "CANADIAN", "EGYPTIAN", "MEETEI", "OL", "SORA", "SYLOTI", "KAYAH"}
_NO_SCRIPT = {"COMBINING", "MODIFIER", "VARIATION"}
_ALIASES = {"Cjk": "Han", "Ideographic": "Han", "Katakana-Hiragana": "Katakana"}


def script(text: str) -> str:
    """The script that most letters of `text` are in, the earlier one among equals: `"Latin"`, `"Cyrillic"`, `"Han"`.

    Where there is no letter: `"Bytes"`, `"Digits"`, `"Punctuation"`, `"Symbols"`, `"Space"`, `"Control"` or
    `"Empty"`. The standard library knows no scripts, so they are read off the characters' Unicode names; fullwidth,
    mathematical and other styled letters count as the plain ones (NFKC).
    """
    rest = _BYTE.sub("", text)
    if text and not rest.strip():
        return "Bytes" if rest != text else "Space"
    characters = unicodedata.normalize("NFKC", rest)
    letters = Counter(found for found in map(_letter_script, characters) if found)
    if letters:
        return letters.most_common(1)[0][0]
    kinds = {
        "N": "Digits",
        "P": "Punctuation",
        "S": "Symbols",
        "Z": "Space",
        "C": "Control",
        "M": "Symbols",
        "L": "Other",
    }
    found = Counter(kinds[unicodedata.category(character)[0]] for character in characters.strip())
    return found.most_common(1)[0][0] if found else "Empty"


def _letter_script(character: str) -> str | None:
    if unicodedata.category(character)[0] not in "LM":
        return None
    words = unicodedata.name(character, "").split()
    if not words or words[0] in _NO_SCRIPT:
        return None
    name = " ".join(words[: 2 if words[0] in _TWO_WORDS else 1]).title()
    return _ALIASES.get(name, name)


def script_shares(texts: Iterable[str]) -> dict[str, float]:
    """Share of texts in each script, largest first, then by name; they sum to 1.

    Raises:
        ValueError: There is no text.
    """
    counts = Counter(map(script, texts))
    if not counts:
        raise ValueError("texts must not be empty, got none: pass the texts of at least one token")
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


# Words.


def count_words(prompts: Sequence[Iterable[str]]) -> dict[str, int]:
    """In how many prompts each word occurs, spaces around it and case left aside.

    A prompt counts a word once: a collapsed prompt would else repeat its few words at every virtual token.

    Args:
        prompts: For each prompt the texts of its nearest tokens.
    """
    counts: Counter[str] = Counter()
    for texts in prompts:
        counts.update({text.strip().casefold() for text in texts} - {""})
    return dict(sorted(counts.items()))


@dataclass(frozen=True, eq=False)
class WordOdds(Result):
    """Words by how over-represented they are, the most so first.

    Attributes:
        words: The words of both groups.
        log_odds: Log-odds ratio of each in the group against the background, in nats, shape `[W]`.
        z: The same in standard deviations, shape `[W]`; beyond 1.96 is over-represented at 5 % for one word.
        counts: In the group, shape `[W]`.
        background: In the background, shape `[W]`.
        prior_strength: Counts that the Dirichlet prior weighs as many as.
    """

    words: list[str]
    log_odds: Tensor
    z: Tensor
    counts: Tensor
    background: Tensor
    prior_strength: float


def over_represented(
    counts: Mapping[str, int], background: Mapping[str, int], prior_strength: float | None = None
) -> WordOdds:
    """Words that a group says more often than a background, rare words held back by a Dirichlet prior.

    Monroe, Colaresi & Quinn (2008), "Fightin' Words", equations 16, 20 and 22: the prior's mean is the frequency of
    each word in both groups together, so that a word which is rare everywhere must be said often to stand out.

    Args:
        counts: Of each word in the group, for example `count_words` of several prompts.
        background: Of each word in what it is compared with: other prompts, prompts drawn from the prior, or the
            vocabulary (each word as often as it has tokens).
        prior_strength: α₀, the prior's weight in counts; by default the size of the smaller group.

    Raises:
        ValueError: A group is empty, a count is negative, there is one word only, or the strength is not positive.
    """
    for name, group in (("counts", counts), ("background", background)):
        if sum(group.values()) <= 0 or min(group.values()) < 0:
            raise ValueError(
                f"{name} must hold counts >= 0 of at least one word that occurs, got {len(group)} words with a total "
                f"of {sum(group.values())}"
            )
    words = sorted(word for word in counts.keys() | background.keys() if counts.get(word, 0) + background.get(word, 0))
    if len(words) < 2:
        raise ValueError(f"counts and background must hold at least 2 words together, got {words}")
    one, other = (torch.tensor([group.get(word, 0) for word in words]).double() for group in (counts, background))
    strength = float(min(one.sum(), other.sum())) if prior_strength is None else float(prior_strength)
    if not strength > 0:
        raise ValueError(f"prior_strength must be > 0, got {prior_strength!r}")
    prior = strength * (one + other) / (one + other).sum()

    def log_odds(group: Tensor) -> Tensor:
        said = group + prior
        return said.log() - (said.sum() - said).log()

    difference = log_odds(one) - log_odds(other)
    z = difference / (1 / (one + prior) + 1 / (other + prior)).sqrt()
    # Words are in alphabetical order already, and a stable sort keeps it among equals.
    order = z.argsort(descending=True, stable=True)
    return WordOdds(
        words=[words[index] for index in order],
        log_odds=difference[order],
        z=z[order],
        counts=one[order].long(),
        background=other[order].long(),
        prior_strength=strength,
    )
