"""Puts what runs inside a server where its Python finds it: the guard, and our sleep mode."""

from __future__ import annotations

import os
from pathlib import Path

from vllm_sleep_tui.engine import backend, guard

MODULE = "panel_guard"
BACKEND = "panel_sleep"
BACKEND_WORKER = f"{BACKEND}.worker.PanelWorker"
_PLUGIN = {
    "METADATA": f"Metadata-Version: 2.1\nName: {BACKEND}\nVersion: 1\n",
    "entry_points.txt": f"[vllm.general_plugins]\n{BACKEND} = {BACKEND}.plugin:register\n",
}
"""What makes vLLM's plugin loader find it without an installation."""


def copy_guard(folder: Path) -> None:
    """Write the guard as ``panel_guard.py`` into `folder` (made with mode 0700), replacing an older copy."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _put(folder / f"{MODULE}.py", Path(guard.__file__).read_bytes())


def copy_backend(folder: Path) -> None:
    """Write our sleep mode as the package ``panel_sleep`` into `folder`, as a plugin of vLLM."""
    package, described = folder / BACKEND, folder / f"{BACKEND}-1.dist-info"
    for made in (package, described):
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in Path(backend.__file__).parent.glob("*.py"):
        _put(package / file.name, file.read_bytes())
    for name, content in _PLUGIN.items():
        _put(described / name, content.encode())


def _put(target: Path, content: bytes) -> None:
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.chmod(0o600)
    # Replaced in one step: another server may be importing it this moment.
    fresh.replace(target)
