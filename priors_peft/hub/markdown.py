"""Text from data in a Markdown page: shown as it is, whatever it holds, but for secrets."""

import html
import json
import os
import re
from pathlib import Path
from typing import Any


_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
_REMOVED = "[removed]"
# What no reader sees or no file can hold: controls, directions of writing, halves of characters.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


# What Markdown obeys within a line, an address that it would link, and what starts a heading, a list or a rule.
_MARKUP = re.compile(
    r"[\\`*\[\]#~|$@]|(?<!\w)_|_(?!\w)|!(?=\[)|:(?=//)|(?<=www)\.|^[-+=]|(?<=^\d)[.)](?= )|(?<=^\d\d)[.)](?= )"
)


def scrub(text: str) -> str:
    """`text` without Hub tokens and without this user's home folder."""
    tokens = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")]
    home = str(Path.home())
    for secret in (*tokens, home):
        if len(secret) > 4:
            text = text.replace(secret, "~" if secret == home else _REMOVED)
    return _TOKEN.sub(_REMOVED, text)


def visible(text: Any) -> str:
    """Text without secrets, and with `�` in place of what can't be seen or written."""
    return _INVISIBLE.sub("�", scrub(str(text)))


def plain(text: Any, most: int = 100) -> str:
    """Text for front matter: one line without markup."""
    flat = re.sub(r"\s+", " ", visible(text))
    flat = re.sub(r"[<>`|]|-{3,}", "", flat).strip()
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def slug(text: Any) -> str:
    """Text as part of a tag: letters, digits and `-_.:`."""
    return re.sub(r"[^\w.:-]+", "-", plain(text)).strip("-")


def escape(text: Any) -> str:
    """Text within a paragraph or a table: line breaks become spaces, markup is shown and not obeyed."""
    flat = html.escape(re.sub(r"\s+", " ", visible(text)).strip(), quote=False)
    return _MARKUP.sub(lambda match: f"&#{ord(match.group())};", flat)


def code(text: Any) -> str:
    """Text in the type of code, within a paragraph or a table; line breaks are shown as ⏎."""
    flat = str(text).replace("\r\n", "\n").replace("\n", "⏎").replace("\r", "⏎")
    return f"<code>{escape(flat)}</code>"


def literal(value: Any) -> str:
    """A value as JSON that is also YAML and, for a text, Python; it can't end a fenced block."""
    text = scrub(json.dumps(value, ensure_ascii=False))
    return re.sub(rf"[<>&`]|{_INVISIBLE.pattern}", lambda match: f"\\u{ord(match.group()):04x}", text)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown already; all columns but the first are aligned to the right."""
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def facts_table(facts: dict[str, str | None]) -> str:
    """A two-column table of what is known; an empty or None value leaves its row out."""
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])
