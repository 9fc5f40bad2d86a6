"""The command line. Verbs are loaded when they are called, so that `status` stays quick."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command of sys.argv and exit with its code."""
    gc.disable()  # until what the command needs is imported: looking for garbage in it took 0.15 s
    try:
        from vllm_sleep_tui.cli.app import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were still being read
        code = 130
    sys.exit(code)
