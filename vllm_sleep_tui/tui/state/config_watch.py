"""Whether the config file, or one that it names, is another than the one that is heeded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.files import Mark, mark

Agrees = Callable[[LoadedConfig], bool]
"""Whether the person has agreed to what a file says: it was named, is their own, or was asked about."""


class ConfigWatch:
    """Looks at the files again and again; a look costs one `stat` for each."""

    def __init__(self, loaded: LoadedConfig, agrees: Agrees) -> None:
        self._found = loaded.found
        self._agrees = agrees
        self._heeded = self._seen = dict(loaded.marks)

    def has_changed(self) -> bool:
        """Whether one was written since it was read, and none since the last look: it may be half written."""
        before, self._seen = self._seen, {path: mark(path) for path in self._heeded}
        is_there = self._seen[self._found] is not None
        return is_there and self._seen != self._heeded and self._seen == before

    async def read(self) -> LoadedConfig:
        """What it says now; raises PanelError with what is wrong, once for each time it is written."""
        marks: dict[Path, Mark] = {}
        before = self._seen
        try:
            loaded = await asyncio.to_thread(load, self._found, marks)
        except BaseException:
            # What is wrong may be mended in a file that is named now, or in one that was named before.
            self._heeded = {**before, **marks}
            raise
        self._heeded = marks
        if not await asyncio.to_thread(self._agrees, loaded):
            raise RefusedError(
                f"{self._found} was found, not named, and has changed.",
                "Quit and open the panel again: it shows what the file would run, and asks.",
            )
        return loaded
