"""What is known now about models, GPUs and the host: frozen values that cross the layers.

The first fields of each struct, in order, are the contract of ``status --json``; unknown is None, never 0.
"""

from __future__ import annotations

import time

import msgspec

from vllm_sleep_tui.fleet.states import StartPhase, State


class OperationSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An operation under way on a model."""

    name: str
    since: float
    """UTC seconds."""
    eta: float | None = None
    """Seconds the whole operation is expected to take."""


class SwitchTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger of one switch, in seconds; a phase that did not happen is None."""

    phases: dict[str, float | None]
    """Keys: drain, sleep, settle, wake, weights, reload, kv_cache, reset, prove."""
    total: float


class LastFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a server died that was started again unasked, told until a person has seen it: see `died`."""

    reason: str
    cure: str = ""
    at: float
    """UTC seconds at which it was seen."""
    log: str | None = None
    """The file that keeps what it said last."""

    def told(self) -> str:
        """One line for a person."""
        return f"It died at {self.clock} and was started again. {self.reason}".rstrip()

    @property
    def clock(self) -> str:
        """The time of day at which it was seen."""
        return time.strftime("%H:%M:%S", time.localtime(self.at))


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """How an awake model serves; token rates over the last 2 s, percentiles and hits over 5 minutes."""

    running: int | None
    """Requests being answered."""
    waiting: int | None
    kv_use: float | None
    """Share (0 to 1) of the KV cache that running requests hold."""
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    ttft_p50: float | None
    """Seconds to the first token; None if nobody asked lately, as for all percentiles."""
    ttft_p95: float | None
    inter_token_p50: float | None
    """Seconds between two tokens."""
    inter_token_p95: float | None
    prefix_hit_share: float | None
    """Share (0 to 1) of prompt tokens that the cache spared."""
    cached_tokens: int | None
    """At most so many tokens are in the KV cache, which a sleep empties."""


class ModelSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One model."""

    name: str
    state: State
    level: int | None = None
    """Sleep level while asleep or falling asleep."""
    phase: StartPhase | str | None = None
    operation: OperationSnapshot | None = None
    pid: int | None = None
    """Of `vllm serve`."""
    port: int | None = None
    gpus: tuple[int, ...] = ()
    vram_bytes: int | None = None
    vram_by_gpu: dict[str, int] | None = None
    ram_bytes: int | None = None
    pinned_bytes: int | None = None
    since: float | None = None
    """UTC seconds at which the state was entered."""
    reason: str | None = None
    cure: str | None = None
    last_switch: SwitchTimes | None = None

    # Beyond the contract, for the panel.
    last_failure: LastFailure | None = None
    progress: str | None = None
    """The detail of a long step, such as "weights 2 of 4"."""
    configured_level: str = "auto"
    """auto, 1, 2 or none."""
    resolved_level: str | None = None
    """What `auto` became at start: 1, 2 or none."""
    sleep_backend: str | None = None
    """own: our sleep mode; stock: vLLM's; None where it is not known."""
    sleep_backend_why: str | None = None
    """Why it is vLLM's although ours was to be had."""
    proof: str | None = None
    """After the last wake or sleep: proven, unproven, unverified."""
    frees_memory: bool = True
    """False for vLLM on the CPU, where sleep is a state and nothing else."""
    source: str = ""
    """The model's hub name, folder or URL."""
    is_attached: bool = False
    """Given by `url:`: it can neither be started nor stopped from here, and what it holds is not seen."""
    serving: Serving | None = None
    """While awake, in a panel or `serve`; None until its first page of figures."""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds VRAM and is not one of our models'."""

    pid: int
    user: str
    command: str
    bytes: int | None


class GpuSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU."""

    index: int
    uuid: str
    name: str
    used_bytes: int | None
    total_bytes: int | None
    utilization: float | None
    """Per cent."""
    simulated: bool = False

    power_watts: float | None = None
    temperature: float | None = None
    """Degrees Celsius."""
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    """Why the clocks are held back; empty: they are not."""
    others: tuple[GpuProcess, ...] = ()


class HostSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's memory; container limits counted."""

    ram_available_bytes: int | None
    ram_total_bytes: int | None


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the screen and `status` show."""

    models: tuple[ModelSnapshot, ...]
    gpus: tuple[GpuSnapshot, ...]
    host: HostSnapshot
    version: int = 1

    time: float = 0.0
    notes: tuple[str, ...] = ()
    """One line each on what cannot be known and why, such as "No NVML: …"."""

    def model(self, name: str) -> ModelSnapshot:
        """The model called `name`; KeyError if the config has none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What `enter` (switch) on a model would do, before it is pressed."""

    target: str
    action: str
    """One of: nothing, wake, switch, start, refused."""
    sleeps: tuple[str, ...] = ()
    """The models that go to sleep first, in order."""
    stops: tuple[str, ...] = ()
    """Models with `level: none` that are stopped instead."""
    seconds: float | None = None
    needs_bytes: dict[str, int] = {}
    """VRAM the target needs, by GPU index."""
    free_bytes: dict[str, int] = {}
    """VRAM free for it once the others sleep, by GPU index."""
    used_after: dict[str, int] = {}
    """VRAM used on each GPU afterwards."""
    sentence: str = ""
    """The whole thing for a person."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an operation, as it happens."""

    model: str
    operation: str
    phase: str
    detail: str = ""
    fraction: float | None = None


class ChatEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of an answer."""

    model: str
    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    switch_seconds: float | None = None
    """On the first event, if the model had to be woken or started."""
    ttft: float | None = None
    """Seconds from the request to the first text, on the event that carries it."""
