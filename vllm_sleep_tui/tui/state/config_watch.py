"""Whether the config file, or one that it names, is another than the one that is heeded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import RefusedError

Agrees = Callable[[LoadedConfig], bool]
"""Whether the person has agreed to what a file says: it was named, is their own, or was asked about."""
_Mark = tuple[int, int, int] | None
_Marks = dict[Path, _Mark]


class ConfigWatch:
    """Looks at the files again and again; a look costs one `stat` for each."""

    def __init__(self, loaded: LoadedConfig, agrees: Agrees) -> None:
        self._found = loaded.found
        self._agrees = agrees
        self._files = [self._found, *loaded.read]
        self._heeded = self._seen = self._marks()

    def has_changed(self) -> bool:
        """Whether one was written since it was read, and none since the last look: it may be half written."""
        before, self._seen = self._seen, self._marks()
        is_there = self._seen[self._found] is not None
        return is_there and self._seen != self._heeded and self._seen == before

    async def read(self) -> LoadedConfig:
        """What it says now; raises PanelError with what is wrong, once for each time it is written."""
        self._heeded = self._seen
        loaded = await asyncio.to_thread(load, self._found)
        self._files = [self._found, *loaded.read]
        # What was known before is heeded as it was before it was read: it may have been written meanwhile.
        self._heeded = self._marks() | {
            path: mark for path, mark in self._seen.items() if path in self._files
        }
        if not await asyncio.to_thread(self._agrees, loaded):
            raise RefusedError(
                f"{self._found} was found, not named, and has changed.",
                "Quit and open the panel again: it shows what the file would run, and asks.",
            )
        return loaded

    def _marks(self) -> _Marks:
        return {path: _mark(path) for path in self._files}


def _mark(path: Path) -> _Mark:
    try:
        there = os.stat(path)
    except OSError:  # gone, or for a moment: editors rename
        return None
    return there.st_ino, there.st_size, there.st_mtime_ns
