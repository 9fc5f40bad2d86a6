"""A picture of a question: its name and size, and where Pillow is installed what it looks like.

Half blocks, two points to a cell: every terminal draws them, in tmux and over SSH too, and none is asked.
"""

from __future__ import annotations

import importlib.util
import io
import warnings

from vllm_sleep_tui.files import path_of, read_regular
from vllm_sleep_tui.fleet.pictures import MOST_BYTES, Picture
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.flow import Flow, PlainRow, Row
from vllm_sleep_tui.tui.drawing.paint import Line

COLUMNS, ROWS = 32, 8
"""Cells that a picture has at most."""
MOST_POINTS = 64_000_000
"""Of a picture that is decoded for it: some bytes may stand for a wall of points."""
Points = list[list[tuple[int, int, int]]]


class Preview:
    """How one picture is shown below its question."""

    def __init__(self, picture: Picture, points: Points | None = None) -> None:
        self.picture = picture
        self._points = points or []

    def rows(self, width: int) -> list[Row]:
        """Its label, and what it looks like where there is room for it."""
        label = Flow((("▣ ", "accent"), (clean(self.picture.words), "muted"))).rows(width)
        if self._points and len(self._points[0]) <= width:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            label += [PlainRow(_row(upper, lower)) for upper, lower in pairs]
        return label


def looked_at(picture: Picture) -> Preview:
    """A picture with what it looks like; without, where nothing here can decode it."""
    size = picture.size or (0, 0)
    if importlib.util.find_spec("PIL") is None or size[0] * size[1] > MOST_POINTS:
        return Preview(picture)
    from PIL import Image, UnidentifiedImageError  # optional: `pip install vllm-sleep-tui[images]`

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a picture of too many points is only warned about
            with Image.open(
                io.BytesIO(read_regular(path_of(picture.path), MOST_BYTES, follow=True))
            ) as image:
                image.draft("RGB", (COLUMNS * 4, ROWS * 8))  # a JPEG is decoded at a part of its size
                small = image.convert("RGB")
                small.thumbnail((COLUMNS, 2 * ROWS))
                small = small.resize((small.width, small.height + small.height % 2))
    except (OSError, ValueError, SyntaxError, Warning, UnidentifiedImageError, Image.DecompressionBombError):
        return Preview(picture)
    points = list(zip(*[iter(small.tobytes())] * 3, strict=True))
    columns = small.width
    return Preview(picture, [points[at : at + columns] for at in range(0, len(points), columns)])


def _row(upper: list[tuple[int, int, int]], lower: list[tuple[int, int, int]]) -> Line:
    pairs = zip(upper, lower, strict=True)
    return tuple(
        ("▀", "#{:02x}{:02x}{:02x} on-#{:02x}{:02x}{:02x}".format(*above, *below)) for above, below in pairs
    )
