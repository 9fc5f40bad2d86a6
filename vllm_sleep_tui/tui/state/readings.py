"""The GPUs' figures over time, kept by the panel while it is open."""

from __future__ import annotations

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot
from vllm_sleep_tui.telemetry.ring import Point, Ring

FINE_SECONDS, FINE_COUNT = 1.0, 600
"""Ten minutes to the second."""
COARSE_SECONDS, COARSE_COUNT = 20.0, 4320
"""A day, three readings a minute."""


class Series:
    """One figure of one GPU: the last minutes finely, the day before coarsely."""

    def __init__(self) -> None:
        self._fine = Ring(FINE_COUNT)
        self._coarse = Ring(COARSE_COUNT)

    def append(self, time: float, value: float | None) -> None:
        """Add a reading; those that come too close together are left out."""
        for ring, spacing in ((self._fine, FINE_SECONDS), (self._coarse, COARSE_SECONDS)):
            if ring.latest is None or time - ring.latest.time >= 0.9 * spacing:
                ring.append(time, value)

    def since(self, start: float) -> tuple[Point, ...]:
        """The readings from a moment on, oldest first."""
        fine = self._fine.since(start)
        first = fine[0].time if fine else start
        older = self._coarse.since(start) if first > start + FINE_SECONDS else ()
        return (*(point for point in older if point.time < first), *fine)


class Readings:
    """Utilisation (per cent) and memory (share of the card, per cent) of each GPU."""

    def __init__(self) -> None:
        self._utilization: dict[str, Series] = {}
        self._memory: dict[str, Series] = {}

    def see(self, snapshot: FleetSnapshot) -> None:
        """Remember this moment."""
        for gpu in snapshot.gpus:
            self.utilization(gpu).append(snapshot.time, gpu.utilization)
            self.memory(gpu).append(snapshot.time, _share(gpu))

    def utilization(self, gpu: GpuSnapshot) -> Series:
        """How busy it was."""
        return self._utilization.setdefault(gpu.uuid, Series())

    def memory(self, gpu: GpuSnapshot) -> Series:
        """How full it was."""
        return self._memory.setdefault(gpu.uuid, Series())


def _share(gpu: GpuSnapshot) -> float | None:
    if gpu.used_bytes is None or not gpu.total_bytes:
        return None
    return 100.0 * gpu.used_bytes / gpu.total_bytes
