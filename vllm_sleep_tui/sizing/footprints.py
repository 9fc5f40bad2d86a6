"""What each model was measured to need: VRAM awake and asleep, pinned RAM, times.

Kept per model, arguments and vLLM version across runs, in ``footprints.json``. Before the first measurement
an estimate stands in, and is called one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

import msgspec

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.files import lock_within, read_regular, write_atomically
from vllm_sleep_tui.units import GIB

KEPT_SAMPLES = 50
"""Times of one kind: enough for a median, and old ones give way to those of a machine that has changed."""
MAX_BYTES = 16 * 2**20
"""Of the file, which has some kB a model."""
LOCK_SECONDS = 1.0
"""A write takes milliseconds; who holds the lock for longer is frozen."""
ASLEEP_GUESS = int(1.6 * GIB)
"""What a sleeper leaves on one GPU; 0.8 to 1.6 GiB measured on an H100 (vLLM 0.24)."""
ASLEEP_GUESS_PARALLEL = int(2.8 * GIB)
"""The same with several GPUs a model, NCCL's buffers included; 2.3 to 2.7 GiB measured."""
AWAKE_OVERHEAD = int(1.7 * GIB)
"""What a server holds beyond its utilization: context and CUDA graphs; 1.6 GiB measured on an H100."""


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """Measurements of one model with one set of arguments on one vLLM version; bytes and seconds."""

    awake: dict[str, int] = {}
    """VRAM by GPU index while awake."""
    asleep: dict[str, int] = {}
    """VRAM by GPU index while asleep at level 1 or 2."""
    resident: dict[str, int] = {}
    """VRAM by GPU index while asleep at level 0, the weights included."""
    pinned: int | None = None
    weights: int | None = None
    times: dict[str, tuple[float, ...]] = {}
    """The last seconds measured, by what was done: start, sleep1-first, sleep0, sleep1, sleep2, wake0, wake1,
    wake2; a sleep until its memory is seen gone, a wake until it is proven."""

    def typical(self, what: str) -> float | None:
        """The median of the seconds measured for `what`; None if it was never done."""
        samples = self.times.get(what)
        return median(samples) if samples else None

    def all_typical(self) -> dict[str, float]:
        """The same of everything that was done."""
        return {what: median(samples) for what, samples in self.times.items() if samples}

    def with_memory(self, *, awake: Mapping[str, int], asleep: Mapping[str, int]) -> Footprint:
        """With VRAM seen awake and asleep, by GPU index; what was not seen stays as it was."""
        return msgspec.structs.replace(self, awake={**self.awake, **awake}, asleep={**self.asleep, **asleep})

    def with_weights(self, weights: int) -> Footprint:
        """With the bytes of weights that the log told."""
        return msgspec.structs.replace(self, weights=weights)

    def with_time(self, what: str, seconds: float) -> Footprint:
        """With one more measurement of `what`."""
        kept = (*self.times.get(what, ()), seconds)[-KEPT_SAMPLES:]
        return msgspec.structs.replace(self, times={**self.times, what: kept})

    def over(self, other: Footprint) -> Footprint:
        """With the figures of `other` where this one has none."""
        return Footprint(
            awake={**other.awake, **self.awake},
            asleep={**other.asleep, **self.asleep},
            resident={**other.resident, **self.resident},
            pinned=other.pinned if self.pinned is None else self.pinned,
            weights=other.weights if self.weights is None else self.weights,
            times={**other.times, **self.times},
        )


class FootprintStore:
    """``footprints.json`` of a state folder."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "footprints.json"
        self._lock = state_dir / "footprints.lock"
        self._noted: dict[str, Footprint] = {}
        self._changes: list[tuple[str, Callable[[Footprint], Footprint]]] = []
        self._noting = threading.Lock()
        self._cache: tuple[tuple[int, int], dict[str, Footprint]] | None = None

    def get(self, digest: str | None, version: str | None) -> Footprint:
        """What was measured; where a figure is missing, that of the version measured last stands in."""
        footprints = {**self._read(), **self._noted} if self._noted else self._read()
        exact, prefix = f"{digest}@{version}", f"{digest}@"
        footprint = footprints.get(exact, Footprint())
        for key in reversed(footprints):
            if key.startswith(prefix) and key != exact:
                footprint = footprint.over(footprints[key])
        return footprint

    def note(self, digest: str, version: str | None, change: Callable[[Footprint], Footprint]) -> None:
        """Apply `change` to what is known here, at once; `flush` writes it, off the path of an operation."""
        key = f"{digest}@{version}"
        with self._noting:
            before = self._noted.get(key) or self._read().get(key, Footprint())
            self._noted[key] = change(before)
            self._changes.append((key, change))

    @property
    def has_to_flush(self) -> bool:
        """Whether something was noted that is not written."""
        return bool(self._changes)

    def flush(self) -> None:
        """Write what was noted, between processes one at a time; a full disk loses it, nothing else.

        So does a process that holds on to the file for LOCK_SECONDS: it may be frozen.
        """
        with self._noting:
            changes, self._changes = self._changes, []
        if not changes:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if lock_within(descriptor, LOCK_SECONDS):
                    written = dict(self._read())
                    for key, change in changes:
                        written[key] = change(written.get(key, Footprint()))
                    write_atomically(self._path, msgspec.json.encode(written))
            finally:
                os.close(descriptor)
        with self._noting:  # what was noted meanwhile, by another thread, is not in the file yet
            written, self._noted = self._read(), {}
            for key, change in self._changes:
                before = self._noted.get(key) or written.get(key) or Footprint()
                self._noted[key] = change(before)

    def _read(self) -> dict[str, Footprint]:
        try:
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino)
            if self._cache is None or self._cache[0] != stamp:
                self._cache = (
                    stamp,
                    msgspec.json.decode(read_regular(self._path, MAX_BYTES), type=dict[str, Footprint]),
                )
        except (OSError, *NOT_JSON):
            return {}  # they are measured again
        return self._cache[1]


def digest(model: ModelConfig) -> str:
    """Names what was measured: the model, its GPUs, its arguments, and vLLM's own sleep mode if asked for."""
    stock = [model.sleep_backend] if model.sleep_backend != "auto" else []
    content = json.dumps([model.model, model.gpus, model.args, *stock], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def asleep_guess(gpus: Iterable[int]) -> int:
    """Bytes a sleeper is assumed to leave on each of its GPUs until it was measured."""
    return ASLEEP_GUESS if len(tuple(gpus)) < 2 else ASLEEP_GUESS_PARALLEL
