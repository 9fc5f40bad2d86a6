"""A short storm; `python -m tests.chaos --kills 500 --seed N` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.storm import Storm

SEED = 20261257
"""With which each kind is chosen three times in the first 24 rounds."""


async def test_thirty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    storm = Storm(tmp_path, SEED)
    try:
        tally = await storm.run(30)
    finally:
        await storm.close()
    assert tally.problems == []
    assert tally.total == 30
    assert set(tally.kills) == {"verb", "leader", "standby", "keeper", "server", "engine", "holder"}
