"""The command line. Verbs are loaded when they are called, so that `status` stays quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command of sys.argv and exit with its code."""
    from vllm_sleep_tui.cli.app import run

    sys.exit(run(sys.argv[1:]))
