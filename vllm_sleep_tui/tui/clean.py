"""Text from outside, made safe to show."""

from __future__ import annotations

import re

from vllm_sleep_tui.engine.logs import strip_escapes

_DIRECTIONS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """The text without what could move the cursor, colour the screen or turn the reading direction."""
    return _DIRECTIONS.sub("", strip_escapes(text)).expandtabs(4)
