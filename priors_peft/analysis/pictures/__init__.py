"""Pictures of an analysis for cards and papers: PNG files that say in their title what the data says."""

import os
from pathlib import Path

from ...files import atomic_path
from .. import claims
from . import activations, faithfulness, geometry, projection, stability, tokens, transfer
from .style import STYLE


PICTURES = (tokens, geometry, projection, activations, faithfulness, stability, transfer)
_DPI = 150


def save_pictures(analysis: claims.Part, folder: str | os.PathLike) -> list[Path]:
    """Draw what an analysis holds: `tokens.png`, `geometry.png`, `projection.png`, `activations.png`,
    `faithfulness.png`, `stability.png` and `transfer.png`, each only where its data is there.

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
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'pictures need matplotlib, which is not installed. Run `pip install "priors_peft[analysis]"`'
        ) from error
    written = []
    with matplotlib.rc_context(STYLE):
        for picture in PICTURES:
            figure = picture.draw(analysis)
            if figure is not None:
                written.append(Path(folder) / f"{picture.__name__.rpartition('.')[2]}.png")
                with atomic_path(written[-1]) as temporary:
                    figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
    return written
