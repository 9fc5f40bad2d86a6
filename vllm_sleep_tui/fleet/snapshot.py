"""What is known now about models, GPUs and the host: frozen values that cross the layers.

The first fields of each struct, in order, are the contract of ``status --json``; unknown is None, never 0.
"""

from __future__ import annotations

from collections.abc import Callable
from socket import socket

import msgspec

from vllm_sleep_tui.engine.answers import Alternative as Alternative
from vllm_sleep_tui.engine.answers import CallDelta as CallDelta
from vllm_sleep_tui.engine.answers import TokenChance as TokenChance
from vllm_sleep_tui.fleet.states import RUNNING, StartPhase, State
from vllm_sleep_tui.sizing.budget import ram_margin
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.units import time_of_day


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

    @property
    def is_wake(self) -> bool:
        """Whether the model slept before; else it was started."""
        return self.phases.get("wake") is not None


class LastFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a server died that was started again unasked, told until a person has seen it: see `died`."""

    reason: str
    cure: str = ""
    at: float
    """UTC seconds at which it was seen."""
    log: str | None = None
    """The file that keeps what it said last."""

    @property
    def sentence(self) -> str:
        """One line for a person."""
        return f"It died at {self.clock} and was started again. {self.reason}".rstrip()

    @property
    def clock(self) -> str:
        """The time of day at which it was seen."""
        return time_of_day(self.at)


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
    kv_cache: str | None = None
    """What its KV cache is not cut below, as the config says it."""
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
    is_external: bool = False
    """Given by `url:`: it can neither be started nor stopped from here, and what it holds is not seen."""
    has_own_server: bool = False
    """It is attached, and a server that was started here before still runs: that one can be stopped."""
    serving: Serving | None = None
    """While awake, in a panel or `serve`; None until its first page of figures."""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that holds VRAM and is not one of our models'."""

    pid: int
    user: str
    command: str
    bytes: int | None


class HeldProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of a model's server, or a stranger, and what it holds."""

    pid: int
    parent: int | None
    """Its parent, if that is one of the same model's."""
    model: str | None
    """Whose server it belongs to; None: a stranger."""
    user: str
    command: str
    vram_by_gpu: dict[str, int | None]
    """Bytes by GPU index; None: it is there with an unknown amount."""
    ram_bytes: int | None
    """Private and pinned."""

    @property
    def vram_bytes(self) -> int | None:
        """On all GPUs together; None if some of it is not known."""
        amounts = list(self.vram_by_gpu.values())
        return None if None in amounts else sum(amount or 0 for amount in amounts)


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
    pool_bytes: int | None = None
    """Of what is used, what the KV pool holds for the next engine and gives up for anybody else; None without
    a pool."""


class HostSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The machine's memory; container limits counted."""

    ram_available_bytes: int | None
    ram_total_bytes: int | None

    @property
    def pinning_limit_bytes(self) -> int | None:
        """RAM in use from which on level 1 is refused; None where the machine's RAM is not known."""
        total = self.ram_total_bytes
        return None if total is None else total - ram_margin(total)


class FleetSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the screen and `status` show."""

    models: tuple[ModelSnapshot, ...]
    gpus: tuple[GpuSnapshot, ...]
    host: HostSnapshot
    version: int = 1

    time: float = 0.0
    notes: tuple[str, ...] = ()
    """One line each on what cannot be known and why, such as "No NVML: …"."""
    read_only: bool = False
    """Whether who took it may only look."""

    def model(self, name: str) -> ModelSnapshot:
        """The model called `name`; KeyError if the config has none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(name)

    def with_servers(self) -> list[str]:
        """The models of which a server of ours runs, those that are attached by now included."""
        return [
            model.name
            for model in self.models
            if model.has_own_server or (model.state in RUNNING and not model.is_external)
        ]


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
    """What would be done, and with which room, for a person; `seconds` stands beside it."""


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How a client's request is carried to the server of a model."""

    launch: str
    """Another one with each launch of a server."""
    uds: str | None
    """The socket where the guard counts it as a client's; None: over `url`."""
    url: str
    headers: tuple[tuple[bytes, bytes], ...]
    """What goes with it; a key may be among them."""
    served: str
    """What the server calls the model."""
    check: Callable[[socket], None] | None
    """Looks who is at the other end of a fresh connection; raises PanelError if nothing may be sent there."""

    def __repr__(self) -> str:
        """Name it without its headers."""
        return f"Way({self.url!r}, {self.served!r})"


WAITING = "waiting"
"""The phase of an operation that waits for somebody else's and has begun nothing."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an operation, as it happens."""

    model: str
    operation: str
    phase: str
    detail: str = ""
    fraction: float | None = None


Report = Callable[[Progress], None]
"""Whom an operation tells of its steps."""


class ChatEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of an answer."""

    model: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    finish_reason: str | None = None
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    switch_seconds: float | None = None
    """On the first event, if the model had to be woken or started."""
    switch_times: SwitchTimes | None = None
    """The ledger of that, beside it."""
    ttft: float | None = None
    """Seconds from the request to the first text, on the event that carries it."""
    context_tokens: int | None = None
    """How many tokens prompt and answer may have together, on the last event where the server says so."""


WHOLE = ("stop", "tool_calls", "function_call")
"""Reasons for which an answer ends where the model wanted it to."""
_CUT = {
    "length": "cut off: the token limit was reached",
    "abort": "cut off: the model was put to sleep or stopped meanwhile",
    "content_filter": "cut off by a content filter",
    "stopped": "stopped: what was said is kept",
}


def cut_words(finish_reason: str | None) -> str:
    """Why an answer is not whole, in words; empty if it is, or if nothing is known."""
    if finish_reason is None or finish_reason in WHOLE:
        return ""
    return _CUT.get(finish_reason, f"cut off: {one_line(finish_reason)}")
