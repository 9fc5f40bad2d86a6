"""What a server's log tells: the phase of a start, and figures in bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_sleep_tui.files import open_regular
from vllm_sleep_tui.units import GIB

MAX_LINE = 16 * 1024
"""Bytes of a line that are shown; vLLM logs its whole configuration in some thousand."""
MAX_READ = 4 * 1024 * 1024
"""Bytes a call, so that a log that grew unread for hours holds up nobody."""
TAIL_STEP = 1024 * 1024
"""Bytes by which the end of a log is looked for, backwards."""
MAX_WHY = 200
"""Characters of a reason that are kept: the record is one page."""

PhaseName = Literal["loading", "compiling", "capturing", "warming"]


@dataclass(frozen=True, slots=True)
class Phase:
    """What a starting server is doing; `fraction` is 0 to 1 of this phase, None where it does not say."""

    name: PhaseName
    detail: str
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """Our sleep mode in a server: in place in every process that told of it, or why it is not."""

    is_own: bool
    why: str


@dataclass(frozen=True, slots=True)
class LogFacts:
    """Figures that vLLM logged, in bytes, summed over its workers; None where no line told."""

    weights_bytes: int | None
    backend: Backend | None = None
    """What our sleep mode said of itself; None if it said nothing."""


@dataclass(frozen=True, slots=True)
class _Sign:
    literal: str
    """What the line contains; whole lines change with each minor release of vLLM."""
    name: PhaseName
    detail: str
    fraction: float | None = None


# vLLM 0.24 to 0.33; the CPU lines from log-start-cold-torch-compile.txt, the rest h100/start-phi3-mini.log.
_SIGNS = (
    # huggingface_hub without a network: it is asked again for minutes even if the cache has all.
    _Sign(
        "thrown while requesting", "loading", "no answer of the model hub; HF_HUB_OFFLINE=1 asks it nothing"
    ),
    _Sign("Starting to load model", "loading", "reading weights", 0.0),
    _Sign("checkpoint shards:", "loading", "reading weights"),
    _Sign("Loading weights took", "loading", "weights read", 1.0),
    _Sign("Model loading took", "loading", "weights loaded", 1.0),
    _Sign("Dynamo bytecode transform time", "compiling", "torch.compile"),
    _Sign("Starting torch.compile", "compiling", "torch.compile"),
    _Sign("Compiling a graph for", "compiling", "torch.compile"),
    _Sign("Warming up model for the compilation", "compiling", "torch.compile"),
    _Sign("torch.compile took", "compiling", "compiled", 1.0),
    # Before the graphs, although it is called a warm-up.
    _Sign("JIT kernel warmup starting", "compiling", "kernels"),
    _Sign("JIT kernel warmup finished", "compiling", "kernels compiled", 1.0),
    _Sign("Capturing CUDA graphs", "capturing", "CUDA graphs"),
    _Sign("Graph capturing finished", "capturing", "CUDA graphs captured", 1.0),
    _Sign("init engine (profile", "warming", "engine ready"),
    _Sign("Starting vLLM server on", "warming", "opening the port"),
    _Sign("Application startup complete", "warming", "serving", 1.0),
)
_PERCENT = re.compile(r"(\d+)%(?: Completed)? ?\|")
_ORDER: tuple[PhaseName, ...] = ("loading", "compiling", "capturing", "warming")

_WORKER = re.compile(r"^\((\w+) pid=\d+\)")
_GIB = r"\d{1,9}(?:\.\d+)?"
_WEIGHTS = re.compile(rf"Model loading took ({_GIB}) GiB")
_FREED = re.compile(rf"sleep freed ({_GIB}) GiB")
_BACKEND = re.compile(r"panel-sleep-backend (\{.*\})")


class PhaseReader:
    """Follows one start of a server, line by line; it never goes back to an earlier phase.

    Only decoration: readiness is what HTTP says.
    """

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._weights: dict[str, int] = {}
        """Bytes by worker."""
        self._backend: Backend | None = None

    def feed(self, line: str) -> Phase | None:
        """The phase that `line` tells of, if it tells anything new."""
        self._read_weights(line)
        if word := _BACKEND.search(line):
            self._read_backend(word[1])
        phase = _phase_in(line)
        if phase is None or phase == self._phase or self._is_earlier(phase):
            return None
        self._phase = phase
        return phase

    @property
    def facts(self) -> LogFacts:
        """The figures so far."""
        return LogFacts(
            weights_bytes=sum(self._weights.values()) if self._weights else None,
            backend=self._backend,
        )

    def _is_earlier(self, phase: Phase) -> bool:
        # With several workers the slower ones still load while the first compiles.
        return self._phase is not None and _ORDER.index(phase.name) < _ORDER.index(self._phase.name)

    def _read_weights(self, line: str) -> None:
        if took := _WEIGHTS.search(line):
            named = _WORKER.match(line)
            self._weights[named[1] if named else ""] = round(float(took[1]) * GIB)

    def _read_backend(self, text: str) -> None:
        """One process's word; a single one without it is enough for vLLM's own."""
        try:
            word = json.loads(text)
            backend = Backend(word["state"] == "own", str(word["why"])[:MAX_WHY])
        except (ValueError, KeyError, TypeError):
            return
        if self._backend is None or self._backend.is_own:
            self._backend = backend


def sleepers_in(lines: Iterable[str]) -> int:
    """How many workers log that their sleep gave memory back; one that freed nothing does not count."""
    return sum(any(float(freed) > 0 for freed in _FREED.findall(line)) for line in lines)


def _phase_in(line: str) -> Phase | None:
    for sign in _SIGNS:
        if sign.literal in line:
            # A bar that was redrawn in one line ends with its newest figure.
            percent = _PERCENT.findall(line)
            fraction = int(percent[-1]) / 100 if percent else sign.fraction
            return Phase(sign.name, sign.detail, fraction)
    return None


class LogTail:
    """Reads what is appended to a log file, also after it was cut or replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode: int | None = None
        self._pending = b""

    def read_new(self) -> list[str]:
        """The lines that were completed since the last call, none if there is no file.

        At most 4 MiB a call; lines are cut at 16 KiB. Of a progress bar that redraws itself with
        carriage returns only the newest state is kept.
        """
        fresh = self._read()  # which forgets the pending part of a file that was cut
        lines = (self._pending + fresh).split(b"\n")
        complete = [_last_drawn(line) for line in lines[:-1]]
        drawn, self._pending = _split_unfinished(lines[-1])
        return [line[:MAX_LINE].decode(errors="replace") for line in [*complete, *drawn]]

    def last(self, count: int) -> list[str]:
        """The last `count` complete lines and what stands unfinished; `read_new` goes on from there.

        None if there is no file; lines are cut as by `read_new`.
        """
        try:
            with os.fdopen(open_regular(self._path, follow=True), "rb") as file:
                status = os.fstat(file.fileno())
                start, content = status.st_size, b""
                while start and content.count(b"\n") <= count:
                    start = max(0, start - TAIL_STEP)
                    file.seek(start)
                    content = file.read(status.st_size - start)
        except FileNotFoundError:
            return []
        self._inode, self._offset = status.st_ino, start + len(content)
        lines = content.split(b"\n")
        complete = [_last_drawn(line) for line in lines[:-1]]
        drawn, self._pending = _split_unfinished(lines[-1])
        shown = [*complete, *drawn][-count:] if count else []
        return [line[:MAX_LINE].decode(errors="replace") for line in shown]

    def _read(self) -> bytes:
        try:
            with os.fdopen(open_regular(self._path, follow=True), "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._offset, self._inode, self._pending = 0, status.st_ino, b""
                file.seek(self._offset)
                fresh = file.read(MAX_READ)
        except FileNotFoundError:
            return b""
        self._offset += len(fresh)
        return fresh


def _last_drawn(line: bytes) -> bytes:
    states = [state for state in line.split(b"\r") if state]
    return states[-1] if states else b""


def _split_unfinished(rest: bytes) -> tuple[list[bytes], bytes]:
    """What can be shown of a line without an end: the newest complete state of a bar; and what stays."""
    *states, tail = rest.split(b"\r")
    if not tail and states:
        tail = states.pop() + b"\r"  # it may be half of \r\n
    drawn = [state for state in states if state][-1:]
    if len(tail) > MAX_LINE:
        return [*drawn, tail], b""
    return drawn, tail
