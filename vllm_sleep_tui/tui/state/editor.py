"""The person's own editor, for a question that is longer than a line."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from vllm_sleep_tui.errors import OperationError

CURE = "Name another with EDITOR, as in: export EDITOR=nano"


def edited(text: str) -> str:
    """What the person made of a text in $VISUAL or $EDITOR, else vi; raises OperationError.

    It lies in a private file meanwhile, which is removed. The terminal must be the editor's.
    """
    words = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        command = shlex.split(words)
    except ValueError as error:
        raise OperationError(f"The editor {words} cannot be started: {error}.", CURE) from None
    try:
        with tempfile.TemporaryDirectory(prefix="vst-question-") as folder:  # 0700
            path = Path(folder) / "question.md"
            path.write_text(text, encoding="utf-8", errors="replace")
            done = subprocess.run([*command, str(path)], check=False)
            if done.returncode:
                raise OperationError(
                    f"{words} ended with {done.returncode}: the question is as before.", CURE
                )
            return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError as error:
        raise OperationError(f"The editor {words} cannot be used: {error.strerror}.", CURE) from None
