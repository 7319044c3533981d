"""Plots: a figure of matplotlib, written to a file once it is drawn."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmi_deploy.errors import MmiError
from mmi_deploy.system.files import write_new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def plotted(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Figure of `width` by `height` inches to draw on; written to `path` at the end of the block,
    in the format of its suffix (`.svg`, `.png`). Raises `MmiError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MmiError(
            "plots require matplotlib, which is not installed", fix="pip install matplotlib"
        ) from None
    # It warns of every mathematical font that is missing, and no plot has formulas.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    write_new_file(path, drawn.getvalue())
