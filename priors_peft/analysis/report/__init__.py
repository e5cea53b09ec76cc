"""One self-contained HTML page of an analysis: works offline, asks nothing of any server, runs only its own scripts.

plotly.js comes from the installed `plotly` package and is stored compressed, which browsers since 2023 unpack: a third of
its size, with nothing vendored and no build step. The page's content security policy names the two scripts that may run
by their hashes, so that nothing which came with an adapter, a token or data can.
"""

import base64
import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

from ...files import atomic_path
from .. import claims
from ..common import check_installed
from ..pictures.activations import conditions
from ..pictures.projection import KIND_LABELS, PLANES, plane_title
from .figures import figures
from .prompts import KIND_SYMBOLS


_HERE = Path(__file__).parent


def save_report(analysis: claims.Part, path: str | os.PathLike) -> Path:
    """Write `report.html`: every section whose data is there, figures to hover over, tables to sort.

    Args:
        analysis: As in `analysis.json`, format version 1. Sections whose key is None are left out.
        path: Of the page; its folder is made if it does not exist.

    Returns:
        The path.

    Raises:
        ImportError: plotly or Jinja2 is not installed.
        ValueError: The analysis is of another format version, or holds no adapter.
    """
    claims.check_analysis(analysis)
    text = _render(_encodable(analysis))
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def _render(analysis: claims.Part) -> str:
    check_installed("a report", ["plotly", "jinja2"])
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {
        "number": claims.number,
        "decimals": claims.decimals,
        "percent": claims.percent,
        "capital": claims.capital,
    }
    plotly, script = _plotly(), _text("report.js")
    return environment.get_template("report.html").render(
        analysis=analysis,
        claims=claims,
        conditions=conditions(analysis["activations"]) if analysis.get("activations") else {},
        kinds=KIND_LABELS,
        symbols=KIND_SYMBOLS,
        planes=PLANES,
        plane_title=plane_title,
        figures=figures(analysis),
        plotly=base64.b64encode(gzip.compress(plotly, compresslevel=9, mtime=0)).decode(),
        script=script,
        style=_text("report.css"),
        hashes=[base64.b64encode(hashlib.sha256(each).digest()).decode() for each in (plotly, script.encode())],
    )


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().encode()


def _encodable(value: Any) -> Any:
    """The same with lone surrogates, which no file can hold, replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, (list, tuple)) else value
