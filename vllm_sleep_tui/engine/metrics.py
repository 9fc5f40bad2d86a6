"""What one page of vLLM's `/metrics` tells. Its names are known here and nowhere else.

Figures are totals over the server's engines; None is what the page does not tell.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from vllm_sleep_tui.telemetry import prometheus
from vllm_sleep_tui.telemetry.prometheus import Buckets, Labels, Scrape


class _Name(StrEnum):
    """A family of the page; all that is read of it."""

    REQUESTS = "vllm:request_success_total"
    PROMPT_TOKENS = "vllm:prompt_tokens_total"
    GENERATED_TOKENS = "vllm:generation_tokens_total"
    PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
    PREFIX_HITS = "vllm:prefix_cache_hits_total"
    RUNNING = "vllm:num_requests_running"
    WAITING = "vllm:num_requests_waiting"
    KV_USE = "vllm:kv_cache_usage_perc"
    CACHE_CONFIG = "vllm:cache_config_info"
    SLEEP_STATE = "vllm:engine_sleep_state"
    TTFT = "vllm:time_to_first_token_seconds"
    INTER_TOKEN = "vllm:inter_token_latency_seconds"


_READ = frozenset(f"{name}{suffix}" for name in _Name for suffix in ("", "_bucket"))
"""What is kept of a page: the figures and the buckets of histograms."""
_LEVELS = {"weights_offloaded": 1, "discard_all": 2}


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one page."""

    time: float
    """When it was read, in seconds of the monotonic clock."""
    requests: float | None
    """That ended since the launch, however they ended; the only count of tasks without tokens."""
    prompt_tokens: float | None
    """Asked since the launch."""
    generated_tokens: float | None
    """Answered since the launch."""
    prefix_queries: float | None
    """Tokens looked up in the prefix cache since the launch."""
    prefix_hits: float | None
    """Those of them that were there."""
    running: float | None
    """Requests that are being answered now."""
    waiting: float | None
    """Requests that wait for their turn."""
    kv_use: float | None
    """Share of the KV cache that running requests hold, 0 to 1; blocks that are kept for later prompts count
    as free (vLLM 0.32, metrics-idle.txt: 0 after many requests)."""
    cache_tokens: float | None
    """Tokens that the KV cache holds when full."""
    keeps_prefixes: bool
    """Whether answered requests stay in the cache; vLLM's default, told from 0.11 on."""
    ttft: Buckets
    """Seconds to the first token."""
    inter_token: Buckets
    """Seconds between two tokens."""
    tells_sleep: bool
    """Whether it has the gauge of the sleep state (vLLM 0.12 and newer)."""
    sleep_level: int | None
    """1 or 2 if it says that it sleeps at that level."""

    @classmethod
    def read(cls, text: str, time: float) -> Page:
        """The page, reduced to its figures; an empty one tells nothing."""
        scrape = prometheus.parse(text, _READ)
        return cls(
            time=time,
            requests=prometheus.total(scrape, _Name.REQUESTS),
            prompt_tokens=prometheus.total(scrape, _Name.PROMPT_TOKENS),
            generated_tokens=prometheus.total(scrape, _Name.GENERATED_TOKENS),
            prefix_queries=prometheus.total(scrape, _Name.PREFIX_QUERIES),
            prefix_hits=prometheus.total(scrape, _Name.PREFIX_HITS),
            running=prometheus.total(scrape, _Name.RUNNING),
            waiting=prometheus.total(scrape, _Name.WAITING),
            kv_use=prometheus.total(scrape, _Name.KV_USE),
            cache_tokens=_cache_tokens(scrape),
            keeps_prefixes=_keeps_prefixes(scrape),
            ttft=prometheus.buckets(scrape, _Name.TTFT),
            inter_token=prometheus.buckets(scrape, _Name.INTER_TOKEN),
            tells_sleep=_Name.SLEEP_STATE in scrape,
            sleep_level=_sleep_level(scrape),
        )

    @property
    def under_way(self) -> float | None:
        """Requests that run or wait; None if it tells neither."""
        counts = [count for count in (self.running, self.waiting) if count is not None]
        return sum(counts) if counts else None

    @property
    def computed_tokens(self) -> float | None:
        """Tokens that were computed since the launch, each of which went into the cache."""
        if self.prompt_tokens is None or self.generated_tokens is None:
            return None
        return self.prompt_tokens + self.generated_tokens - (self.prefix_hits or 0.0)

    @property
    def signs_of_life(self) -> tuple[float | None, ...]:
        """What moves while an engine works; a long prompt moves only the use of the KV cache (vLLM 0.32)."""
        return (self.generated_tokens, self.prompt_tokens, self.kv_use, self.running, self.waiting)


def _sleep_level(scrape: Scrape) -> int | None:
    for state, level in _LEVELS.items():
        if prometheus.total(scrape, _Name.SLEEP_STATE, sleep_state=state):
            return level
    return None


def _keeps_prefixes(scrape: Scrape) -> bool:
    configs = scrape.get(_Name.CACHE_CONFIG, ())
    return all(labels.get("enable_prefix_caching", "True") == "True" for labels, _ in configs)


def _cache_tokens(scrape: Scrape) -> float | None:
    sizes = [_cache_size(labels) for labels, _ in scrape.get(_Name.CACHE_CONFIG, ())]
    return sum(size or 0.0 for size in sizes) if sizes and None not in sizes else None


def _cache_size(labels: Labels) -> float | None:
    """vLLM's own figure (0.32), else blocks times their size, which is too high for hybrid models."""
    try:
        return float(labels["kv_cache_size_tokens"])
    except (KeyError, ValueError):
        pass
    try:
        return float(labels["num_gpu_blocks"]) * float(labels["block_size"])
    except (KeyError, ValueError):
        return None
