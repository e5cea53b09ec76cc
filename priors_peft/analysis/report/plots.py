"""What the report's figures share: text escaped, figures rounded, panels, heat maps, as plotly.js takes them."""

import html
from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import claims
from ..pictures.style import array


Figure = dict[str, Any]

BAND = "rgba(128, 128, 128, 0.22)"


def plain(text: Any) -> str:
    """`text` so that plotly, which reads a few HTML tags, shows it as it is."""
    return html.escape(str(text), quote=False)


def short(text: Any, length: int = 24) -> str:
    """The same of at most `length` characters."""
    return plain(text if len(str(text)) <= length else str(text)[: length - 1] + "…")


def rounded(values: Iterable[Any]) -> list[float | None]:
    """Four significant digits, which no screen tells from more; nan becomes None."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in array(list(values))]


def title(text: str) -> dict[str, str]:
    """As plotly.js wants titles."""
    return {"text": text}


def panels(count: int, columns: int, gap: float = 0.08) -> tuple[Figure, int]:
    """Axes of a grid of panels, row by row from the top, and its number of rows."""
    rows = -(-count // columns)
    layout: Figure = {}
    for index in range(count):
        row, column = divmod(index, columns)
        key = axis_key(index)
        width, height = (1 - gap * (columns - 1)) / columns, (1 - 1.6 * gap * (rows - 1)) / rows
        left, top = column * (width + gap), 1 - row * (height + 1.6 * gap)
        layout[f"xaxis{key}"] = {"domain": [left, left + width], "anchor": f"y{key}"}
        layout[f"yaxis{key}"] = {"domain": [max(0.0, top - height), top], "anchor": f"x{key}"}
    return layout, rows


def axis_key(index: int) -> str:
    """What follows `x`, `y`, `xaxis` and `yaxis` in the names of a panel's axes."""
    return "" if index == 0 else str(index + 1)


def heading(index: int, text: str) -> Figure:
    """A panel's title."""
    key = axis_key(index)
    return {
        "text": text,
        "xref": f"x{key} domain",
        "yref": f"y{key} domain",
        "x": 0,
        "y": 1,
        "yanchor": "bottom",
        "xanchor": "left",
        "showarrow": False,
        "align": "left",
    }


def on(index: int) -> dict[str, str]:
    """Which panel a trace is drawn in."""
    return {} if index == 0 else {"xaxis": f"x{index + 1}", "yaxis": f"y{index + 1}"}


def name_axis(texts: Iterable[Any]) -> Figure:
    """An axis of names; numbered, as plotly would draw two equal names as one."""
    shown = [short(text) for text in texts]
    return {"tickvals": list(range(len(shown))), "ticktext": shown, "automargin": True}


def heat_map(values: Any, rows: Iterable[Any], columns: Iterable[Any], **settings: Any) -> Figure:
    """A trace of a matrix whose cells say their row, column and value."""
    values = array(values)
    lines, heads = list(rows), list(columns)
    return {
        "type": "heatmap",
        "z": [rounded(row) for row in values],
        "text": [
            [
                f"{plain(name)}<br>{plain(head)}<br>{claims.number(value)}"
                for head, value in zip(heads, row, strict=True)
            ]
            for name, row in zip(lines, values.tolist(), strict=True)
        ],
        "hoverinfo": "text",
        "colorscale": "Cividis",
        **settings,
    }
