"""Pictures of an analysis for cards and papers: PNG files that say in their title what the data says."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ...files import atomic_path
from .. import claims
from ..common import check_installed
from . import activations, faithfulness, geometry, posterior, projection, stability, tokens, transfer
from .style import STYLE


PICTURES = (tokens, geometry, posterior, projection, activations, faithfulness, stability, transfer)
_DPI = 150


def save_pictures(analysis: claims.Part, folder: str | os.PathLike) -> list[Path]:
    """Draw what an analysis holds: `tokens.png`, `geometry.png`, `posterior.png`, `projection.png`,
    `activations.png`, `faithfulness.png`, `stability.png` and `transfer.png`, each only where its data is there.

    Args:
        analysis: As in `analysis.json`, format version 1.
        folder: Made if it does not exist.

    Returns:
        The files written, 1,200 pixels wide and readable at 800.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: The analysis is of another format version, or holds no adapter.
    """
    claims.check_analysis(analysis)
    drawn = {picture.__name__.rpartition(".")[2]: partial(picture.draw, analysis) for picture in PICTURES}
    return save_figures(drawn, folder)


def save_figures(drawn: Mapping[str, Callable[[], Any]], folder: str | os.PathLike) -> list[Path]:
    """Draw figures in one style and write each as `NAME.png`; one that is None is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_installed("a picture", ["matplotlib"])
    import matplotlib

    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw()
            if figure is not None:
                written.append(Path(folder) / f"{name}.png")
                with atomic_path(written[-1]) as temporary:
                    figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    return written
