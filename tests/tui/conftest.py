"""What all tests of the panel have: keys that are heeded one after the other, and no tmux around them."""

from __future__ import annotations

import pytest
from screen_text import settled
from textual.pilot import Pilot

_press = Pilot.press


async def _one_by_one(pilot: Pilot[None], *keys: str) -> None:
    for key in keys:
        await _press(pilot, key)
        await settled(pilot)


@pytest.fixture(autouse=True)
def patient_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Textual takes a process that got no time for an idle one, and presses the next key before its time."""
    monkeypatch.setattr(Pilot, "press", _one_by_one)


@pytest.fixture(autouse=True)
def no_tmux(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests in tmux would find what they copy in its buffer."""
    monkeypatch.delenv("TMUX", raising=False)
