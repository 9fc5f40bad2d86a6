"""`status --prometheus`: the snapshot in Prometheus' text format 0.0.4, without what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.states import State

Labels = Mapping[str, str]
Samples = Iterable[tuple[Labels, float | None]]
PREFIX = "vllm_sleep_tui"


def page(snapshot: FleetSnapshot) -> str:
    """The whole text; bytes, seconds and UTC seconds, shares from 0 to 1."""
    families = [*_of_models(snapshot.models), *_of_gpus(snapshot.gpus), *_of_host(snapshot)]
    return "".join(families)


def _of_models(models: Iterable[ModelSnapshot]) -> list[str]:
    each = [({"model": model.name}, model) for model in models]
    return [
        _gauge("model_state", "1 for the state that the model is in, 0 for the others.", _states(each)),
        _gauge("model_sleep_level", "Sleep level while asleep.", ((who, m.level) for who, m in each)),
        _gauge(
            "model_since_seconds", "UTC seconds of the state's begin.", ((who, m.since) for who, m in each)
        ),
        _gauge("model_vram_bytes", "VRAM that the model's processes hold, by GPU.", _vram(each)),
        _gauge("model_ram_bytes", "RAM held, the pinned pool included.", ((w, m.ram_bytes) for w, m in each)),
        _gauge("model_pinned_bytes", "Pinned RAM.", ((who, m.pinned_bytes) for who, m in each)),
        _gauge("model_last_switch_seconds", "What the last switch to the model took.", _totals(each)),
        _gauge("model_last_switch_phase_seconds", "The same, by phase.", _phases(each)),
    ]


Each = Iterable[tuple[dict[str, str], ModelSnapshot]]


def _states(each: Each) -> Samples:
    return (({**who, "state": state.value}, float(m.state is state)) for who, m in each for state in State)


def _vram(each: Each) -> Samples:
    return (({**who, "gpu": gpu}, size) for who, m in each for gpu, size in (m.vram_by_gpu or {}).items())


def _totals(each: Each) -> Samples:
    return ((who, m.last_switch.total) for who, m in each if m.last_switch)


def _phases(each: Each) -> Samples:
    return (
        ({**who, "phase": phase}, seconds)
        for who, m in each
        if m.last_switch
        for phase, seconds in m.last_switch.phases.items()
    )


def _of_gpus(gpus: Iterable[GpuSnapshot]) -> list[str]:
    each = [({"gpu": str(gpu.index), "uuid": gpu.uuid, "name": gpu.name}, gpu) for gpu in gpus]
    return [
        _gauge("gpu_used_bytes", "VRAM in use, whoever uses it.", ((who, g.used_bytes) for who, g in each)),
        _gauge("gpu_total_bytes", "VRAM of the card.", ((who, g.total_bytes) for who, g in each)),
        _gauge("gpu_utilization_ratio", "Busy share of the time, 0 to 1.", ((w, _share(g)) for w, g in each)),
        _gauge("gpu_power_watts", "Power drawn.", ((who, g.power_watts) for who, g in each)),
        _gauge("gpu_temperature_celsius", "Temperature.", ((who, g.temperature) for who, g in each)),
        _gauge("gpu_simulated", "1 if the card is not real.", ((who, float(g.simulated)) for who, g in each)),
    ]


def _share(gpu: GpuSnapshot) -> float | None:
    return None if gpu.utilization is None else gpu.utilization / 100


def _of_host(snapshot: FleetSnapshot) -> list[str]:
    host = snapshot.host
    return [
        _gauge(
            "host_ram_available_bytes", "RAM to be had, limits counted.", [({}, host.ram_available_bytes)]
        ),
        _gauge("host_ram_total_bytes", "RAM, limits counted.", [({}, host.ram_total_bytes)]),
    ]


def _gauge(name: str, text: str, samples: Samples) -> str:
    """One family; empty if none of its values is known."""
    lines = [
        f"{PREFIX}_{name}{_labels(labels)} {value!r}\n" for labels, value in samples if value is not None
    ]
    return (
        "".join((f"# HELP {PREFIX}_{name} {text}\n# TYPE {PREFIX}_{name} gauge\n", *lines)) if lines else ""
    )


def _labels(labels: Labels) -> str:
    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
