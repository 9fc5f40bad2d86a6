"""The one cleaner: text from outside, made safe to show on a terminal.

From outside is whatever we did not write: logs, answers, configs and the names of their folders, the words in
other users' locks, command lines. What a terminal obeys goes; what it only draws stays.
"""

from __future__ import annotations

import re

_ESCAPES = re.compile(
    r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]"  # colours, cursor
    # Titles, links, the clipboard. Of one that is not closed in its line only the introducer goes: it must
    # not hide what follows.
    r"|\x1b[\]PX^_](?:[^\x07\x1b\x9c\n]{0,4096}(?:\x07|\x1b\\|\x9c))?"
    r"|\x1b[ -/]{0,8}[0-~]"
)
_UNFINISHED = re.compile(
    r"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}|[\]PX^_][^\x07\x1b\x9c\n]{0,4096}\x1b?|[ -/]{0,8})\Z"
)
"""The beginning of one of them at the end of a text, which more text may finish."""
_OBEYED = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tabs and line ends, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # what turns the reading direction
    r"\u2028\u2029\ufff9-\ufffb"  # line ends of another kind, notes between lines
    r"\ud800-\udfff"  # halves of a character, and bytes of a name that is not UTF-8
)
_MOST_PIECES = 1000
OBEYED = re.compile(f"[{_OBEYED}]")
"""A character that a terminal obeys or that cannot be written at all."""


def clean(text: str) -> str:
    """`text` without escapes, control characters and turned directions; tabs and line ends stay.

    A byte that is not UTF-8 (of a path, as Python keeps it) is shown as ``\\xff``.
    """
    return OBEYED.sub(_visible, _ESCAPES.sub("", text))


class Cleaner:
    """`clean` for a text that comes in pieces, which may cut an escape in two.

    The pieces that it gives, joined, are `clean` of the pieces that it took, joined.
    """

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """What can be shown of the text so far and was not given before."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        end = len(text) if unfinished is None else unfinished.start()
        self._held = text[end:]
        return clean(text[:end])

    def end(self) -> str:
        """The rest, as no more text comes."""
        rest, self._held = self._held, ""
        return clean(rest)


class Pieces:
    """A text that comes in pieces, in few strings: one of its own for each token takes ten times as much."""

    def __init__(self, text: str = "") -> None:
        self._parts = [text] if text else []
        self._new: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._parts or self._new)

    def add(self, text: str) -> None:
        """Take a piece."""
        self._new.append(text)
        if len(self._new) >= _MOST_PIECES:
            self._parts.append("".join(self._new))
            self._new.clear()

    def whole(self) -> str:
        """The text so far."""
        return "".join([*self._parts, *self._new])


def one_line(text: str) -> str:
    """`text` cleaned, each run of blanks and line ends as one blank."""
    return " ".join(clean(re.sub(r"[\r\v\f\x85\u2028\u2029]", " ", text)).split())


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return "\N{REPLACEMENT CHARACTER}" if 0xD800 <= code <= 0xDFFF else ""
