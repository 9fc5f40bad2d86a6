"""The long storm: `python -m tests.chaos --kills 500 --seed 1`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.storm import Storm


async def storm(kills: int, seed: int, folder: Path) -> int:
    """Run it and say what came of it; the exit code."""
    running = Storm(folder, seed)
    began = time.monotonic()
    try:
        tally = await running.run(kills)
    finally:
        await running.close()
    print(tally.summary(seed, time.monotonic() - began))
    for problem in tally.problems:
        print(f"  {problem}")
    return 1 if tally.problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for records and logs, kept afterwards")
    given = parser.parse_args()
    logging.disable(logging.INFO)
    if given.keep:
        given.keep.mkdir(parents=True)
        return asyncio.run(storm(given.kills, given.seed, given.keep))
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        return asyncio.run(storm(given.kills, given.seed, Path(folder)))


if __name__ == "__main__":
    sys.exit(main())
