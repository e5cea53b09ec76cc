"""Names that must be among known ones: what an error says of any other, and which one was meant."""

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """`". Did you mean 'a' or 'b'?"` with the known names nearest to `name`, whatever their case; empty if none is near."""
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(name.lower(), lower, n=count)
    return f". Did you mean {' or '.join(repr(lower[one]) for one in near)}?" if near else ""


def unknown(name: Any, known: Iterable[str]) -> str:
    """The end of an error about a name that is not among `known`: what was expected, what was got, what was meant."""
    known = list(known)
    return f"one of {', '.join(known)}, got {name!r}{did_you_mean(str(name), known)}"


def check_at_least(name: str, value: Any, least: int, why: str = "") -> None:
    """Raise `ValueError` unless `value` is an integer >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}{why and ': '}{why}")


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in (choices := list(choices)):
        raise ValueError(f"{argument} must be {unknown(value, choices)}")
