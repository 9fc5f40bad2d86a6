"""A new user's minutes: from nothing to the first switch in the demo, each step with its seconds.

python benchmarks/first_minutes.py clone|wheel|uv

`clone` is what the README says; `wheel` installs a wheel that was built before with pip into a new
environment, `uv` with `uv tool install` (uv must be on PATH). Each begins with an empty home, so packages
come from the index. The demo is opened in a terminal (a pty) and its keys are pressed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/tui"))

from pty_terminal import Terminal  # noqa: E402 - a folder of tests is no package


def timed(what: str, work: Callable[[], object]) -> None:
    """Do one step and say what it took."""
    began = time.monotonic()
    work()
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


def run(*command: str | Path, env: dict[str, str]) -> None:
    """One command of the way, as a person types it."""
    subprocess.run([str(one) for one in command], env=env, check=True, stdout=subprocess.DEVNULL)


def install(way: str, work: Path, env: dict[str, str]) -> Path:
    """Install in this way; the command."""
    if way == "clone":
        timed(
            "git clone", lambda: run("git", "clone", "--quiet", "--no-local", ROOT, work / "clone", env=env)
        )
        timed("python3 -m venv", lambda: run("python3", "-m", "venv", work / "venv", env=env))
        timed("pip install .", lambda: run(work / "venv/bin/pip", "install", "-q", work / "clone", env=env))
        return work / "venv/bin/vllm-sleep-tui"
    uv = shutil.which("uv") or sys.exit("uv is not on PATH")
    run(uv, "build", "--quiet", "--wheel", "--out-dir", work / "dist", ROOT, env=env)
    (wheel,) = (work / "dist").glob("*.whl")
    if way == "uv":
        more = env | {"UV_TOOL_DIR": str(work / "tools"), "UV_TOOL_BIN_DIR": str(work / "bin")}
        timed("uv tool install", lambda: run(uv, "tool", "install", "--quiet", wheel, env=more))
        return work / "bin/vllm-sleep-tui"
    timed("python3 -m venv", lambda: run("python3", "-m", "venv", work / "venv", env=env))
    timed("pip install the wheel", lambda: run(work / "venv/bin/pip", "install", "-q", wheel, env=env))
    return work / "venv/bin/vllm-sleep-tui"


def main() -> None:
    """Go one way to the first switch."""
    way = sys.argv[1] if len(sys.argv) > 1 else "clone"
    with tempfile.TemporaryDirectory(prefix="vst-") as name:
        work = Path(name)
        (work / "home").mkdir()
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("XDG", "VIRTUAL_ENV"))
        }
        env |= {"HOME": str(work / "home"), "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        began = time.monotonic()
        command = install(way, work, env)
        terminal = Terminal([str(command), "demo"], env, 120, 40)
        try:
            timed("vllm-sleep-tui demo: the first screen", lambda: terminal.wait_for("SIMULATED", "coder"))

            def awake(keys: str, *said: str) -> None:
                terminal.press(keys)
                terminal.wait_for(*said)

            timed("enter: the first model starts", lambda: awake("\r", "qwen awake"))
            timed("down, enter: the second starts, the first sleeps", lambda: awake("\x1b[B\r", "phi awake"))
            timed("up, enter: the first switch", lambda: awake("\x1b[A\r", "last switch to qwen"))
            print(f"{time.monotonic() - began:7.1f} s  in all ({way})")
        finally:  # whatever came of it, no server of the demo is left
            terminal.press("q")
            terminal.wait_for("Stop them")
            terminal.press("s")
            terminal.end()
            terminal.close()


if __name__ == "__main__":
    main()
