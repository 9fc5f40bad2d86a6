"""The Prometheus text of ``/metrics``: vLLM's own family names (metrics-families.txt)."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from vllm_sleep_tui.simulator.client import Generation

TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
SECOND_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
)
HISTOGRAMS: Mapping[str, Sequence[float]] = {
    "vllm:request_prompt_tokens": TOKEN_BUCKETS,
    "vllm:request_generation_tokens": TOKEN_BUCKETS,
    "vllm:time_to_first_token_seconds": SECOND_BUCKETS,
    "vllm:inter_token_latency_seconds": SECOND_BUCKETS,
    "vllm:request_time_per_output_token_seconds": SECOND_BUCKETS,
    "vllm:e2e_request_latency_seconds": SECOND_BUCKETS,
    "vllm:request_queue_time_seconds": SECOND_BUCKETS,
    "vllm:request_inference_time_seconds": SECOND_BUCKETS,
    "vllm:request_prefill_time_seconds": SECOND_BUCKETS,
    "vllm:request_decode_time_seconds": SECOND_BUCKETS,
}
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")
DURATIONS_FROM = 32
"""The minor version from which the durations of sleep and wake are counted."""


class _Histogram:
    """Counts by bucket, of one family."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._inside = [0] * len(buckets)
        self._count = 0
        self._sum = 0.0

    def add(self, value: float) -> None:
        """One more value."""
        self._count += 1
        self._sum += value
        for place, bucket in enumerate(self._buckets):
            self._inside[place] += value <= bucket

    def render(self, name: str, model: str) -> Iterator[str]:
        """Its lines."""
        yield f"# HELP {name} Histogram of {name.removeprefix('vllm:')}."
        yield f"# TYPE {name} histogram"
        for bucket, inside in zip(self._buckets, self._inside, strict=True):
            yield f'{name}_bucket{{engine="0",le="{float(bucket)}",{model}}} {float(inside)}'
        yield f'{name}_bucket{{engine="0",le="+Inf",{model}}} {float(self._count)}'
        yield f'{name}_count{{engine="0",{model}}} {float(self._count)}'
        yield f'{name}_sum{{engine="0",{model}}} {self._sum}'


class Metrics:
    """Counts of one server since its start."""

    def __init__(self, *, name: str, minor: int, kv_tokens: int, utilization: float, log_stats: bool) -> None:
        self._log_stats = log_stats
        self._labels = f'engine="0",model_name="{name}"'
        self._minor = minor
        self._kv_tokens = kv_tokens
        self._utilization = utilization
        self._sleep_state = "awake"
        self._histograms = {name: _Histogram(buckets) for name, buckets in HISTOGRAMS.items()}
        self._finished: Counter[str] = Counter()
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._seconds: dict[str, tuple[int, float]] = {}
        self._in_flight: Counter[str] = Counter()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._started = time.time()

    def record_sleep(self, level: int) -> None:
        """The gauge follows the request, not the memory; level 0 and 3 leave all states at 0."""
        self._sleep_state = {1: "weights_offloaded", 2: "discard_all"}.get(level, "")

    def record_wake(self) -> None:
        """The gauge says awake."""
        self._sleep_state = "awake"

    @contextlib.contextmanager
    def operation(self, name: str) -> Iterator[None]:
        """Count a sleep or a wake."""
        begun = time.monotonic()
        self._in_flight[name] += 1
        try:
            yield
            count, total = self._seconds.get(name, (0, 0.0))
            self._seconds[name] = (count + 1, total + time.monotonic() - begun)
        finally:
            self._in_flight[name] -= 1

    def record_tokens(self, count: int) -> None:
        """Tokens as they come."""
        self._generation_tokens += count

    def record_prompt(self, count: int) -> None:
        """A prompt that the engine has read."""
        self._prompt_tokens += count

    def record_finish(self, generation: Generation, reason: str) -> None:
        """A request that ended other than by its client's leaving."""
        now = time.monotonic()
        first = generation.first or now
        per_token = (now - first) / max(1, generation.made - 1)
        self._finished[reason] += 1
        found = {
            "vllm:request_prompt_tokens": len(generation.prompt),
            "vllm:request_generation_tokens": generation.made,
            "vllm:time_to_first_token_seconds": first - generation.begun,
            "vllm:inter_token_latency_seconds": per_token,
            "vllm:request_time_per_output_token_seconds": per_token,
            "vllm:e2e_request_latency_seconds": now - generation.begun,
            "vllm:request_queue_time_seconds": 0.0001,
            "vllm:request_inference_time_seconds": now - generation.begun,
            "vllm:request_prefill_time_seconds": first - generation.begun,
            "vllm:request_decode_time_seconds": now - first,
        }
        for name, value in found.items():
            self._histograms[name].add(value)

    def record_answer(self, handler: str, method: str, status: int) -> None:
        """One HTTP answer."""
        self._http[handler, method, f"{status // 100}xx"] += 1

    def render(self, *, running: int, held_tokens: int) -> str:
        """The whole text."""
        lines = [*self._process()]
        if self._log_stats:
            lines += [*self._gauges(running, held_tokens), *self._counters()]
            model = self._labels.partition(",")[2]
            for name, histogram in self._histograms.items():
                lines += histogram.render(name, model)
        if self._minor >= DURATIONS_FROM:
            lines += self._operations()
        lines += self._answers()
        return "\n".join(lines) + "\n"

    def _process(self) -> Iterator[str]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        yield from _family("process_resident_memory_bytes", "gauge", {"": float(usage.ru_maxrss * 1024)})
        yield from _family("process_start_time_seconds", "gauge", {"": self._started})
        yield from _family("process_cpu_seconds_total", "counter", {"": cpu})
        yield from _family("process_open_fds", "gauge", {"": float(len(os.listdir("/proc/self/fd")))})

    def _gauges(self, running: int, held_tokens: int) -> Iterator[str]:
        labels = self._labels
        yield from _family("vllm:num_requests_running", "gauge", {labels: running})
        yield from _family("vllm:num_requests_waiting", "gauge", {labels: 0})
        reasons = {f'{labels},reason="{reason}"': 0.0 for reason in ("capacity", "deferred")}
        yield from _family("vllm:num_requests_waiting_by_reason", "gauge", reasons)
        states = {
            f'{labels},sleep_state="{state}"': float(state == self._sleep_state) for state in SLEEP_STATES
        }
        yield from _family("vllm:engine_sleep_state", "gauge", states)
        yield from _family(
            "vllm:kv_cache_usage_perc", "gauge", {labels: held_tokens / max(1, self._kv_tokens)}
        )
        config = (
            f'block_size="16",cache_dtype="auto",engine="0",gpu_memory_utilization="{self._utilization:g}"'
        )
        blocks = f'{config},kv_cache_size_tokens="{self._kv_tokens}",num_gpu_blocks="{self._kv_tokens // 16}"'
        yield from _family("vllm:cache_config_info", "gauge", {blocks: 1.0})

    def _counters(self) -> Iterator[str]:
        labels = self._labels
        counts = {
            "vllm:prefix_cache_queries_total": self._prompt_tokens,
            "vllm:prefix_cache_hits_total": 0,
            "vllm:num_preemptions_total": 0,
            "vllm:prompt_tokens_total": self._prompt_tokens,
            "vllm:generation_tokens_total": self._generation_tokens,
        }
        for name, count in counts.items():
            yield from _family(name, "counter", {labels: count})
        finished = {
            f'engine="0",finished_reason="{reason}",{labels.partition(",")[2]}': self._finished[reason]
            for reason in FINISH_REASONS
        }
        yield from _family("vllm:request_success_total", "counter", finished)

    def _operations(self) -> Iterator[str]:
        name = "vllm:sleep_mode_operation_duration_seconds"
        if self._seconds:
            yield f"# HELP {name} Duration of sleep mode operations."
            yield f"# TYPE {name} summary"
        for operation, (count, total) in self._seconds.items():
            yield f'{name}_count{{operation="{operation}"}} {float(count)}'
            yield f'{name}_sum{{operation="{operation}"}} {total}'
        flying = {f'operation="{operation}"': float(count) for operation, count in self._in_flight.items()}
        if flying:
            yield from _family("vllm:sleep_mode_operations_in_flight", "gauge", flying)

    def _answers(self) -> Iterator[str]:
        counts = {
            f'handler="{handler}",method="{method}",status="{status}"': count
            for (handler, method, status), count in self._http.items()
        }
        yield from _family("http_requests_total", "counter", counts)


def _family(name: str, kind: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP {name} {name.rpartition(':')[2].replace('_', ' ').capitalize()}."
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{{{labels}}} {float(value)}" if labels else f"{name} {float(value)}"
