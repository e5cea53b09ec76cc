"""Text from data in a Markdown page: shown as it is, whatever it holds."""

import html
import json
import re
from typing import Any


def plain(text: Any, most: int = 100) -> str:
    """Text for front matter: one line without markup."""
    flat = re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(text))
    flat = re.sub(r"[<>`|]|-{3,}", "", flat).strip()
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def slug(text: Any) -> str:
    """Text as part of a tag: letters, digits and `-_.:`."""
    return re.sub(r"[^\w.:-]+", "-", plain(text)).strip("-")


def escape(text: Any) -> str:
    """Text within a paragraph or a table: line breaks become spaces, markup is shown and not obeyed."""
    flat = html.escape(re.sub(r"\s+", " ", str(text)), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#~|!$@:])|(?<=w)\.", lambda match: f"&#{ord(match.group())};", flat)


def code(text: Any) -> str:
    """Text in the type of code, within a paragraph or a table; line breaks are shown as ⏎."""
    flat = str(text).replace("\r\n", "\n").replace("\n", "⏎").replace("\r", "⏎")
    return f"<code>{escape(flat)}</code>"


def literal(value: Any) -> str:
    """A value as JSON that is also YAML and, for a text, Python; it can't end a fenced block."""
    text = json.dumps(value, ensure_ascii=False)
    for sign in "<>&`\u2028\u2029\x85":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown already; all columns but the first are aligned to the right."""
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, rule, *rows])


def facts_table(facts: dict[str, str | None]) -> str:
    """A two-column table of what is known; an empty or None value leaves its row out."""
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])
