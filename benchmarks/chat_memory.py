"""What the panel holds after each of many long answers, in one conversation and in a new one for each.

    python benchmarks/chat_memory.py [--answers 10] [--tokens 60000] [--rate 5000] [--beside COMMIT]

The panel runs in a terminal over a server of another process; its memory is what it alone holds (USS),
read a second after each answer. With `--beside` the same is measured of an earlier commit, from a copy of its
tree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from panel_speed import Screen, memory_of, own, talker

ROOT = Path(__file__).parents[1]


def held(tree: Path, answers: int, tokens: int, rate: int, *, anew: bool) -> list[float]:
    """MB after each answer, the first figure before any."""
    with tempfile.TemporaryDirectory() as name, talker(tokens, rate) as url:
        folder = Path(name)
        config = folder / "vllm-sleep-tui.yaml"
        config.write_text(json.dumps({"models": {"talker": {"url": url}}}))
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
        places = {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        screen = Screen(command, own(folder) | places, folder)
        try:
            screen.until("q quit")
            screen.until("awake")
            screen.drain(2)
            found = [memory_of(screen) / 1e6]
            for number in range(answers):
                screen.press("c")
                screen.drain(0.3)
                screen.press("fast\r")
                screen.until("THE-END")
                screen.press("\x1b")
                screen.drain(1)
                if anew:
                    screen.press("\x0e")
                    screen.until("Nothing said yet")
                    screen.drain(0.5)
                found.append(memory_of(screen) / 1e6)
                print(f"answer {number + 1}: {found[-1]:.1f} MB", file=sys.stderr, flush=True)
            return found
        finally:
            screen.close()


def rows(tree: Path, given: argparse.Namespace, what: str) -> list[str]:
    """Both ways of one tree, as rows of a table."""
    lines = []
    for anew in (False, True):
        found = held(tree, given.answers, given.tokens, given.rate, anew=anew)
        words = "a new conversation each" if anew else "one conversation"
        later = (found[-1] - found[1]) / max(1, len(found) - 2)
        lines.append(f"| {what}, {words} | {found[0]:.0f} | {found[1]:.0f} | {found[-1]:.0f} | {later:.1f} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", type=int, default=10, help="how many, two at least")
    parser.add_argument("--tokens", type=int, default=60_000, help="of each answer")
    parser.add_argument("--rate", type=int, default=5_000, help="tokens a second")
    parser.add_argument("--beside", metavar="COMMIT", help="measure this commit, too")
    given = parser.parse_args()
    lines = [
        f"| MB, {given.tokens:,} tokens each | before | after 1 | after {given.answers} | each more |",
        "|---|---|---|---|---|",
        *rows(ROOT, given, "now"),
    ]
    if given.beside:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(
                ["git", "archive", given.beside], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            lines += rows(Path(folder), given, given.beside)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
