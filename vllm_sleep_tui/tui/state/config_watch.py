"""Whether the config file is another than the one that is heeded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import RefusedError

Agrees = Callable[[LoadedConfig], bool]
"""Whether the person has agreed to what a file says: it was named, is their own, or was asked about."""
_Mark = tuple[int, int, int] | None


class ConfigWatch:
    """Looks at the file again and again; a look costs one `stat`."""

    def __init__(self, loaded: LoadedConfig, agrees: Agrees) -> None:
        self._found = loaded.found
        self._agrees = agrees
        self._heeded = self._seen = self._mark()

    def has_changed(self) -> bool:
        """Whether it was written since it was read, and not since the last look: it may be half written."""
        before, self._seen = self._seen, self._mark()
        return self._seen not in (None, self._heeded) and self._seen == before

    async def read(self) -> LoadedConfig:
        """What it says now; raises PanelError with what is wrong, once for each time it is written."""
        self._heeded = self._seen
        loaded = await asyncio.to_thread(load, self._found)
        if not await asyncio.to_thread(self._agrees, loaded):
            raise RefusedError(
                f"{self._found} was found, not named, and has changed.",
                "Quit and open the panel again: it shows what the file would run, and asks.",
            )
        return loaded

    def _mark(self) -> _Mark:
        try:
            there = os.stat(self._found)
        except OSError:  # gone, or for a moment: editors rename
            return None
        return there.st_ino, there.st_size, there.st_mtime_ns
