"""Log lines in vLLM's form, on stdout."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Log:
    """Writes lines such as ``(EngineCore pid=7) INFO 11-23 07:26:12 [core.py:114] …``, each in one write."""

    process: str

    def info(self, source: str, text: str) -> None:
        """An INFO line per line of `text`."""
        self._write("INFO", source, text)

    def warning(self, source: str, text: str) -> None:
        """A WARNING line per line of `text`."""
        self._write("WARNING", source, text)

    def error(self, source: str, text: str) -> None:
        """An ERROR line per line of `text`."""
        self._write("ERROR", source, text)

    def bar(self, text: str) -> None:
        """A progress line; those go to stderr."""
        raw(f"{self._prefix()}{text}", descriptor=2)

    def _write(self, level: str, source: str, text: str) -> None:
        now = time.strftime("%m-%d %H:%M:%S")
        raw("\n".join(f"{self._prefix()}{level} {now} [{source}] {line}" for line in text.split("\n")))

    def _prefix(self) -> str:
        return f"({self.process} pid={os.getpid()}) "


def raw(text: str, *, descriptor: int = 1) -> None:
    """Write text and a newline as they are; a reader that is gone is no error, as an orphan must live on."""
    with contextlib.suppress(OSError):
        os.write(descriptor, text.encode() + b"\n")
