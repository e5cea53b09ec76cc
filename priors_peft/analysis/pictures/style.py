"""What pictures share: colours, text that any font can draw, figures with the claim in their title."""

import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import claims


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito (2008), colours that all kinds of colour vision tell apart, without black and yellow; wine is Paul Tol's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
GREY, PALE = "#808080", "#BDBDBD"
SIGNAL, INHERITED = COLOURS[0], COLOURS[4]

# Above this many adapters a picture has a row for each instead of a panel.
DETAILED = 4
_WIDTH = 8.0
# Any: stubs of matplotlib want literal keys.
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "axes.formatter.useoffset": False,
    "text.parse_math": False,
    "figure.facecolor": "white",
}


def colours(adapters: Sequence[claims.Part]) -> dict[str, tuple[str, str]]:
    """Colour and legend entry of each adapter, by name: its own, or its task's where there are more than colours."""
    tasks = [adapter.get("task") for adapter in adapters]
    by_task = len(adapters) > len(COLOURS) and all(tasks) and len(set(tasks)) <= len(COLOURS)
    keys = [str(task) if by_task else adapter["name"] for adapter, task in zip(adapters, tasks, strict=True)]
    place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return {
        adapter["name"]: (COLOURS[place[key] % len(COLOURS)], key) for adapter, key in zip(adapters, keys, strict=True)
    }


def drawable(text: str, length: int = 18) -> str:
    """`text` cut to `length` characters, those that the font lacks as `<U+4E2D>`, so that no box stands for a word."""
    shown = "".join(character if _has_glyph(character) else f"<U+{ord(character):04X}>" for character in str(text))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


@cache
def _has_glyph(character: str) -> bool:
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return character.isprintable() and font.get_char_index(ord(character)) != 0


def array(values: Any) -> np.ndarray:
    """Numbers of an analysis, None as nan."""
    return np.array(values, dtype=float)


def prior_band(tokens: claims.Part) -> np.ndarray:
    """Bounds of random prompts' scores for each virtual token, `[2, P]`."""
    low, high = tokens["prior_band"]
    return np.stack([np.broadcast_to(array(bound), len(tokens["virtual_tokens"])) for bound in (low, high)])


def new_figure(title: str, height: float) -> "Figure":
    """A figure of card width, `height` inches high below its title."""
    from matplotlib.figure import Figure

    lines = _wrapped(title)
    figure = Figure((_WIDTH, height + 0.2 * len(lines)), layout="constrained")
    # Labels of neighbours, and of the first column and the edge, don't touch.
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def _wrapped(title: str) -> list[str]:
    return textwrap.wrap(drawable(title, 400), 84)


def add_legend(owner: Any, entries: Mapping[str, Mapping[str, Any]], **place: Any) -> None:
    """A legend of entries that look as said, not as what was drawn first."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{"linestyle": "none", **style}) for style in entries.values()]
    owner.legend(handles, [drawable(label, 28) for label in entries], **place)


def adapter_rows(axis: "Axes", adapters: Sequence[claims.Part]) -> None:
    """Make the vertical axis one of adapters, the first on top."""
    axis.set_yticks(range(len(adapters)), [drawable(adapter["name"], 24) for adapter in adapters])
    axis.set_ylim(len(adapters) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
