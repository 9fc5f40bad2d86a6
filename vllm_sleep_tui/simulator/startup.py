"""The engine's start: its phases with their log lines, its memory, and the ways in which it fails."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
from collections.abc import Sequence

from vllm_sleep_tui.simulator import failures
from vllm_sleep_tui.simulator.arguments import Options
from vllm_sleep_tui.simulator.behaviours import Fault, Faults
from vllm_sleep_tui.simulator.devices import SimulatedGpu
from vllm_sleep_tui.simulator.engine import Engine, end_quietly
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.memory import Memory, Rank, WorkerRank, work
from vllm_sleep_tui.simulator.processes import Channel, spawn, wait_for_ever
from vllm_sleep_tui.simulator.profiles import (
    GIB,
    LOAD_SECONDS_PER_GIB,
    START_SECONDS,
    MemoryPlan,
    context_bytes,
    kv_bytes_per_token,
    plan_memory,
    weights_bytes,
)
from vllm_sleep_tui.simulator.settings import Settings
from vllm_sleep_tui.simulator.sleep_state import SleepState

CPU_KV_CACHE_BYTES = 4 * GIB
"""What vLLM takes for its cache on the CPU when it is not told."""
TINY_KV_CACHE_BYTES = 1 << 20
"""Too little for one request of any length a model is served with."""
TITLE = "VLLM::EngineCore"
BACKEND_MINORS = (24, 25, 26)
"""Of the versions with which the panel's own sleep mode puts itself in place."""


def run_engine(channel: Channel, options: Options, settings: Settings, names: Sequence[str]) -> None:
    """The engine process from its start to its end; exits with 1 if the start fails."""
    start = _Start(channel, options, settings, Faults(names))
    try:
        start.run()
    except failures.StartFailed as error:
        cause = f"EngineCore failed to start.\n{failures.TRACEBACK}\n{error}"
        Log("EngineCore").error("core.py:1510", cause)
        raise SystemExit(1) from None
    start.engine().serve()


class _Start:
    """One start of an engine; holds what the phases share."""

    def __init__(self, channel: Channel, options: Options, settings: Settings, faults: Faults) -> None:
        self._channel = channel
        self._options = options
        self._settings = settings
        self._faults = faults
        self._log = Log("EngineCore")
        world = options.tensor_parallel * options.pipeline_parallel
        self._gpus = settings.visible_gpus()[:world]
        self._total = self._gpus[0].total_bytes if self._gpus else 0
        self._weights = weights_bytes(options.model)
        self._plan = self._plan_memory(world)
        self._kv_bytes_each = max(1, kv_bytes_per_token(options.model, ranks=world))
        self._memory = Memory((), (), None)

    def run(self) -> None:
        """Every phase; raises StartFailed."""
        self._settings.wait(START_SECONDS["spawn"])
        self._log.info(
            "core.py:133",
            f"Initializing a V1 LLM engine (v{self._settings.version}) with config: "
            f"{describe(self._options)}",
        )
        if self._options.worker_extension.startswith("panel_sleep."):
            why = self._backend_misfit()
            word = {"state": "stock" if why else "own", "why": why, "vllm": self._settings.version}
            self._log.bar(f"panel-sleep-backend {json.dumps(word)}")
        if self._faults.has(Fault.START_HANGS):
            wait_for_ever()
        self._memory = Memory(self._make_ranks(), [gpu.index for gpu in self._gpus], self._settings.folder)
        end_quietly()
        self._take_context()
        self._load()
        self._compile()
        self._profile()
        self._capture()
        self._settings.wait(START_SECONDS["warm"])
        took = sum(START_SECONDS[phase] for phase in ("compile", "profile", "capture", "warm"))
        self._log.info(
            "core.py:402",
            f"init engine (profile, create kv cache, warmup model) took {took / self._settings.speed:.2f} s",
        )
        self._channel.send(
            {"ready": {"kv_tokens": self._kv_tokens(), "world": max(1, len(self._memory.ranks))}}
        )

    def engine(self) -> Engine:
        """The engine of a start that has run."""
        frees = self._options.sleep_mode and bool(self._gpus)
        has_extension = self._options.worker_extension.startswith("panel_sleep.")
        state = SleepState(
            memory=self._memory,
            plan=self._plan,
            settings=self._settings,
            faults=self._faults,
            frees=frees,
            why_no_reload=failures.why_no_reload(self._options, self._settings.minor),
            is_own=has_extension and not self._backend_misfit(),
        )
        return Engine(
            channel=self._channel,
            name=self._options.served_names[0],
            memory=self._memory,
            state=state,
            settings=self._settings,
            faults=self._faults,
            has_extension=has_extension,
        )

    def _backend_misfit(self) -> str:
        """Why the panel's sleep mode leaves vLLM's own in place; empty where it does not."""
        if not self._gpus:
            return "this vLLM does not run on an NVIDIA GPU"
        if self._faults.has(Fault.BACKEND_REFUSES):
            return "vllm.device_allocator.cumem has no create_and_map(allocation_handle)"
        if self._settings.minor not in BACKEND_MINORS:
            return f"vLLM {self._settings.version} has not been seen with it on a GPU"
        return ""

    def _plan_memory(self, world: int) -> MemoryPlan:
        if not self._gpus:
            kv_cache = self._options.kv_cache_bytes or CPU_KV_CACHE_BYTES
            return MemoryPlan(weights=self._weights, kv_cache=kv_cache, residual=0)
        return plan_memory(
            weights=self._weights,
            total=self._total,
            utilization=self._options.utilization,
            kv_cache=self._options.kv_cache_bytes,
            ranks=world,
            eager=self._options.enforce_eager,
        )

    def _make_ranks(self) -> list[Rank | WorkerRank]:
        if len(self._gpus) == 1:
            return [Rank(self._settings.folder, self._gpus[0], TITLE)]
        ranks: list[Rank | WorkerRank] = []
        places: Sequence[SimulatedGpu | None] = self._gpus or (None,)
        ends: list[socket.socket] = [self._channel.socket]
        for place, gpu in enumerate(places):
            title = self._worker_title(place)
            rank = Rank(self._settings.folder, gpu, title)
            pid, channel = spawn(title, functools.partial(work, rank), close=tuple(ends))
            ends.append(channel.socket)
            ranks.append(WorkerRank(pid, channel))
        return ranks

    def _worker_title(self, place: int) -> str:
        if not self._gpus:
            return "VLLM::Worker"
        tensor = self._options.tensor_parallel
        pipeline = f"_PP{place // tensor}" if self._options.pipeline_parallel > 1 else ""
        expert = f"_EP{place}" if "enable_expert_parallel" in self._options.given else ""
        return f"VLLM::Worker{pipeline}{f'_TP{place % tensor}' if tensor > 1 else ''}{expert}"

    def _take_context(self) -> None:
        if not self._gpus:
            return
        fits = self._memory.set_base(context_bytes(self._total))
        free = min(self._free(gpu) for gpu in self._gpus)
        if not fits or free < self._options.utilization * self._total:
            raise failures.too_little_free(
                free=free, total=self._total, utilization=self._options.utilization
            )

    def _free(self, gpu: SimulatedGpu) -> int:
        return gpu.total_bytes - self._memory.used_on(gpu.index)

    def _load(self) -> None:
        shards = max(1, round(self._weights / (4 * GIB)))
        seconds = START_SECONDS["load"] + LOAD_SECONDS_PER_GIB * self._plan.weights / GIB
        self._log.info("gpu_model_runner.py:5160", f"Starting to load model {self._options.model}...")
        self._log.info(
            "weight_utils.py:1108",
            f"Filesystem type for checkpoints: EXT4. Checkpoint size: {self._weights / GIB:.2f} GiB.",
        )
        if self._faults.has(Fault.KILLED_WHILE_LOADING):
            os.kill(os.getpid(), signal.SIGKILL)
        for shard in range(shards + 1):
            share = round(100 * shard / shards)
            done = f"{share:3d}% Completed | {shard}/{shards} [00:00<00:00, 1.00it/s]"
            self._log.bar(f"Loading safetensors checkpoint shards: {done}")
            if shard < shards:
                self._settings.wait(seconds / shards)
                self._map("weights", self._plan.weights * (shard + 1) // shards)
        self._log.info(
            "default_loader.py:501", f"Loading weights took {seconds / self._settings.speed:.2f} seconds"
        )
        for place in range(len(self._memory.ranks)):
            title = self._worker_title(place) if len(self._memory.ranks) > 1 else TITLE
            Log(title.removeprefix("VLLM::")).info(
                "gpu_model_runner.py:5255",
                f"Model loading took {self._plan.weights / GIB:.2f} GiB memory and "
                f"{seconds / self._settings.speed:.6f} seconds",
            )

    def _map(self, tag: str, amount: int) -> None:
        if self._gpus and (self._faults.has(Fault.CUDA_OOM) or not self._memory.map(tag, amount)):
            free = min(self._free(gpu) for gpu in self._gpus)
            raise failures.cuda_out_of_memory(asked=amount, total=self._total, free=free)

    def _compile(self) -> None:
        if self._options.enforce_eager:
            return
        seconds = START_SECONDS["compile"]
        self._log.info(
            "backends.py:1089", "Using cache directory: torch_compile_cache for vLLM's torch.compile"
        )
        self._settings.wait(seconds * 0.8)
        self._log.info("backends.py:1148", f"Dynamo bytecode transform time: {seconds * 0.8:.2f} s")
        self._settings.wait(seconds * 0.2)
        self._log.info("monitor.py:53", f"torch.compile took {seconds:.2f} s in total")

    def _profile(self) -> None:
        before = [self._free(gpu) for gpu in self._gpus]
        self._settings.wait(START_SECONDS["profile"])
        now = [self._free(gpu) for gpu in self._gpus]
        if sum(now) > sum(before):
            raise failures.profiling_disturbed(before=sum(before), now=sum(now))
        too_small = self._faults.has(Fault.KV_CACHE_TOO_SMALL)
        available = TINY_KV_CACHE_BYTES if too_small else self._plan.kv_cache
        if available <= 0:
            raise failures.no_cache_blocks()
        each = self._kv_bytes_each
        needed = each * self._options.max_model_len
        if too_small or (self._gpus and available < needed):
            fits = available // each
            raise failures.cache_too_small(
                max_model_len=self._options.max_model_len, needed=needed, available=available, fits=fits
            )
        self._log.info("gpu_worker.py:508", f"Available KV cache memory: {available / GIB:.2f} GiB")
        self._map("kv_cache", self._plan.kv_cache)
        kind = "GPU" if self._gpus else "CPU"
        length = self._options.max_model_len
        self._log.info(
            "kv_cache_utils.py:2327",
            f"{kind} KV cache size: {self._kv_tokens():,} tokens, Maximum concurrency for "
            f"{length:,} tokens per "
            f"request: {self._kv_tokens() / length:.2f}x",
        )

    def _kv_tokens(self) -> int:
        return self._plan.kv_cache // self._kv_bytes_each

    def _capture(self) -> None:
        seconds, graphs = START_SECONDS["capture"], 51
        if not self._options.enforce_eager and self._gpus:
            for mode in ("mixed prefill-decode, PIECEWISE", "decode, FULL"):
                for done in (0, graphs // 2, graphs):
                    bar = f"{100 * done // graphs:3d}%|          | {done}/{graphs} [00:00<00:01, 26.37it/s]"
                    self._log.bar(f"Capturing CUDA graphs ({mode}): {bar}")
                    self._settings.wait(seconds / 6)
            self._log.info(
                "gpu_model_runner.py:6656", f"Graph capturing finished in {seconds:.0f} secs, took 0.56 GiB"
            )
        if self._gpus and not self._memory.set_base(self._plan.residual):
            raise failures.cuda_out_of_memory(asked=self._plan.residual, total=self._total, free=0)


def describe(options: Options) -> str:
    """The config that the log and `/server_info` show."""
    return (
        f"model='{options.model}', tokenizer='{options.model}', dtype=torch.bfloat16, "
        f"max_seq_len={options.max_model_len}, load_format={options.load_format}, "
        f"tensor_parallel_size={options.tensor_parallel}, "
        f"pipeline_parallel_size={options.pipeline_parallel}, "
        f"quantization={options.quantization}, enforce_eager={options.enforce_eager}, "
        f"enable_sleep_mode={options.sleep_mode}, served_model_name={options.served_names[0]}"
    )
