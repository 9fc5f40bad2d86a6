"""The one cleaner: text from outside, made safe to show on a terminal.

From outside is whatever we did not write: logs, answers, configs and the names of their folders, the words in
other users' locks, command lines. What a terminal obeys goes; what it only draws stays.
"""

from __future__ import annotations

import re

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    # Titles, links, the clipboard. One that is never closed ends with its line: it must not hide the rest.
    r"|\x1b[\]PX^_][^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_OBEYED = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tabs and line ends, DEL, C1
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # what turns the reading direction
    r"\u2028\u2029\ufff9-\ufffb"  # line ends of another kind, notes between lines
    r"\ud800-\udfff"  # halves of a character, and bytes of a name that is not UTF-8
)
OBEYED = re.compile(f"[{_OBEYED}]")
"""A character that a terminal obeys or that cannot be written at all."""


def clean(text: str) -> str:
    """`text` without escapes, control characters and turned directions; tabs and line ends stay.

    A byte that is not UTF-8 (of a path, as Python keeps it) is shown as ``\\xff``.
    """
    return OBEYED.sub(_visible, _ESCAPES.sub("", text))


def one_line(text: str) -> str:
    """`text` cleaned, each run of blanks and line ends as one blank."""
    return " ".join(clean(re.sub(r"[\r\v\f\x85\u2028\u2029]", " ", text)).split())


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return "\N{REPLACEMENT CHARACTER}" if 0xD800 <= code <= 0xDFFF else ""
