"""Puts the guard where a server's Python finds it."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_sleep_tui.engine import guard

MODULE = "panel_guard"


def copy_guard(folder: Path) -> None:
    """Write the guard as ``panel_guard.py`` into `folder` (made with mode 0700), replacing an older copy."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{MODULE}.py"
    fresh = folder / f".{MODULE}.{os.getpid()}"
    fresh.write_bytes(Path(guard.__file__).read_bytes())
    fresh.chmod(0o600)
    # Replaced in one step: another server may be importing it this moment.
    fresh.replace(target)
