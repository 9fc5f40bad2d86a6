"""Serving figures: what a page of `/metrics` comes to, and who is asked for one, on simulated servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.fleet.beside import client_of, core_of
from tests.fleet.conftest import LIMIT, Box, inject, seen, until
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.observe.serving import (
    NOTHING,
    PROOF,
    ServingPoller,
    Watch,
    Work,
    cached_tokens,
)
from vllm_sleep_tui.telemetry.prometheus import parse, total

MakeBox = Callable[..., Box]


def text(**figures: Any) -> str:
    """A page of vLLM's with these figures."""
    given: dict[str, Any] = dict.fromkeys(
        ("prompt", "generated", "hits", "queries", "kv", "running", "waiting", "finished"), 0
    )
    given |= {"ttft": (0, 0), "blocks": 1000, "prefixes": "True", **figures}
    quick, all_ = given["ttft"]
    labels = '{engine="0",model_name="m"}'
    config = f'block_size="16",enable_prefix_caching="{given["prefixes"]}",num_gpu_blocks="{given["blocks"]}"'
    return f"""\
vllm:num_requests_running{labels} {given["running"]}
vllm:num_requests_waiting{labels} {given["waiting"]}
vllm:kv_cache_usage_perc{labels} {given["kv"]}
vllm:prompt_tokens_total{labels} {given["prompt"]}
vllm:generation_tokens_total{labels} {given["generated"]}
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="m"}} {given["finished"]}
vllm:request_success_total{{engine="0",finished_reason="length",model_name="m"}} 2
vllm:prefix_cache_queries_total{labels} {given["queries"]}
vllm:prefix_cache_hits_total{labels} {given["hits"]}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="m"}} {quick}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.5",model_name="m"}} {all_}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} {all_}
vllm:cache_config_info{{{config}}} 1.0
"""


def page(time: float, **figures: Any) -> Page:
    return Page.read(text(**figures), time)


def test_rates_percentiles_and_hits_are_those_of_the_time_that_was_watched() -> None:
    watch = Watch()
    watch.see(page(100.0, prompt=900, generated=500, queries=900, hits=800, ttft=(70, 90)), 50.0)
    now = page(102.0, prompt=1100, generated=600, queries=1100, hits=850, ttft=(78, 100), kv=0.25, running=3)
    serving = watch.see(now, 50.0)
    assert (serving.running, serving.waiting, serving.kv_use) == (3, 0, 0.25)
    assert serving.prompt_tokens_per_s == 100
    assert serving.generation_tokens_per_s == 50
    assert serving.prefix_hit_share == 0.25
    # Ten requests since, eight of them within 0.1 s.
    assert serving.ttft_p50 == pytest.approx(0.0625)
    assert serving.ttft_p95 == pytest.approx(0.4)
    assert serving.inter_token_p50 is None


def test_old_requests_leave_the_percentiles_after_five_minutes() -> None:
    watch = Watch()
    for second in range(0, 400, 10):
        serving = watch.see(page(float(second), ttft=(0, 0 if second < 50 else 5)), 0.0)
        if second == 100:
            assert serving.ttft_p50 == pytest.approx(0.3)
    assert serving.ttft_p50 is None


def test_nothing_is_known_of_a_server_without_figures() -> None:
    serving = Watch().see(Page.read("http_requests_total 7\n", 1.0), 0.0)
    assert serving.running is None
    assert serving.generation_tokens_per_s is None
    assert serving.cached_tokens is None


@pytest.mark.parametrize(
    ("figures", "before", "tokens"),
    [
        ({"prompt": 5000, "generated": 1000}, 0, 6000),
        ({"prompt": 5000, "generated": 1000, "hits": 4000}, 0, 2000),
        ({"prompt": 5000, "generated": 1000}, 5500, 500),
        ({"prompt": 50_000, "generated": 0}, 0, 16_000),
        ({"prompt": 5000, "prefixes": "False"}, 0, 0),
        ({"prompt": 5000, "prefixes": "False", "kv": 0.5}, 0, 8000),
        ({"prompt": 5000, "blocks": "None"}, 0, None),
    ],
    ids=[
        "what was computed",
        "not what was spared",
        "not what an earlier sleep has emptied",
        "never more than the cache",
        "nothing is kept",
        "what is in use",
        "a cache of unknown size",
    ],
)
def test_the_cached_tokens_are(figures: dict[str, Any], before: float, tokens: int | None) -> None:
    assert cached_tokens(page(1.0, **figures), before) == tokens


def test_a_sleep_empties_the_cache_and_a_restart_forgets_it() -> None:
    watch = Watch()
    assert watch.see(page(1.0, prompt=3000), 10.0).cached_tokens == 3000
    assert watch.see(page(9.0, prompt=3016), 20.0).cached_tokens == 16


def test_what_was_served_is_what_the_counters_grew_by_and_nothing_is_known_before_the_first_page() -> None:
    watch = Watch()
    watch.see(page(1.0, prompt=3000, generated=100, finished=7), 10.0)
    assert watch.work == NOTHING
    watch.see(page(3.0, prompt=3040, generated=160, finished=8), 10.0)
    assert watch.work == Work(requests=1, prompt_tokens=40, generated_tokens=60)
    watch.see(page(5.0, prompt=3040, generated=160, finished=8), 10.0)
    assert watch.work == NOTHING


def test_the_proof_of_a_wake_is_nobodys_request() -> None:
    watch = Watch()
    watch.see(page(1.0, prompt=100, generated=10, finished=3), 10.0)
    watch.see(page(2.0, prompt=112, generated=11, finished=4), 20.0, PROOF)
    assert watch.work == NOTHING
    watch.see(page(3.0, prompt=152, generated=61, finished=5), 20.0, PROOF)
    assert watch.work == Work(1, 40, 50)
    watch.see(page(9.0, prompt=174, generated=70, finished=7), 30.0, PROOF)
    assert watch.work == Work(1, 10, 8)


async def ask(fleet: Fleet, name: str, words: int) -> None:
    """A chat to its end."""
    async for _ in fleet.chat(name, [{"role": "user", "content": "word " * words}], params={"max_tokens": 8}):
        pass


async def test_an_open_panel_knows_how_its_awake_model_serves_and_what_a_switch_would_lose(
    box: MakeBox,
) -> None:
    machine = box(speed="1000")
    async with Fleet(load(machine.config), machine.state_dir, leads=True) as fleet:
        await fleet.start(["a", "b"])
        await until(lambda: seen(fleet, "a").serving is not None)
        assert "cached" not in fleet.predict("b").sentence
        await ask(fleet, "a", 1000)

        def figures() -> Any:
            return seen(fleet, "a").serving

        # None where a page did not come in time.
        await until(lambda: figures() and (figures().cached_tokens or 0) >= 1000)
        await until(lambda: figures() and figures().ttft_p50 is not None and figures().running == 0)
        assert f"a loses up to {figures().cached_tokens:,} cached tokens." in fleet.predict("b").sentence
        assert seen(fleet, "b").serving is None
        await fleet.switch("b")
        assert seen(fleet, "a").serving is None


async def test_only_awake_models_are_asked(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        poller = ServingPoller(core_of(fleet))
        for _ in range(3):
            await poller.look()
        assert set(poller.figures) == {"a"}
        assert await times_asked(fleet, "a") == 3
        assert await times_asked(fleet, "b") == 0


async def test_the_leader_keeps_what_was_served_and_it_outlives_the_panel(box: MakeBox) -> None:
    machine = box(speed="1000")
    async with Fleet(load(machine.config), machine.state_dir, leads=True) as leader:
        await leader.start(["a", "b"])
        await until(lambda: seen(leader, "a").serving is not None)
        async with Fleet(load(machine.config), machine.state_dir, leads=True) as beside:
            await until(lambda: seen(beside, "a").serving is not None)
            await ask(leader, "a", 500)
            await until(lambda: served(beside, "a").requests == 1)
            await until(lambda: (figures := seen(beside, "a").serving) and figures.cached_tokens >= 500)
        kept = served(leader, "a")
        assert 500 <= kept.prompt_tokens < 600
        assert kept.generated_tokens == 8
        # What is answered just before a sleep counts, and so does the first question after a wake.
        await ask(leader, "a", 100)
        await leader.switch("b")
        await until(lambda: served(leader, "a").requests == 2)
        await leader.switch("a")
        await ask(leader, "a", 100)
        await until(lambda: served(leader, "a").requests == 3)
    async with machine.open() as later:
        kept = served(later, "a")
        assert (kept.requests, kept.generated_tokens) == (3, 24)
        assert served(later, "b") == NOTHING


async def test_a_proof_that_is_counted_late_is_nobodys_request(box: MakeBox) -> None:
    machine = box(speed="1000")
    async with Fleet(load(machine.config), machine.state_dir, leads=True) as leader:
        await leader.start(["a", "b"])
        await until(lambda: seen(leader, "a").serving is not None)
        await leader.switch("b")
        await inject(leader, "a", "counts_late")
        await leader.switch("a")
        await until(lambda: seen(leader, "a").serving is not None)
        await ask(leader, "a", 100)
        await until(lambda: served(leader, "a").generated_tokens >= 8 and served(leader, "a").requests)
        assert served(leader, "a")[::2] == (1, 8)


def served(fleet: Fleet, name: str) -> Work:
    """All that the history knows of a model."""
    entries = [
        entry for entry in fleet._core.history.served_between(0, time.time() + 60) if entry.model == name
    ]
    each = [(entry.requests, entry.prompt_tokens, entry.generated_tokens) for entry in entries]
    return Work(*(sum(counts) for counts in zip(*each, strict=True)))


async def times_asked(fleet: Fleet, name: str) -> float:
    """How often the server was asked for its page before this, as it counts itself."""
    client = client_of(fleet, name)
    scrape = parse(await client.metrics(), frozenset({"http_requests_total"}))
    return total(scrape, "http_requests_total", handler="/metrics") or 0.0


async def test_a_server_that_does_not_answer_has_no_figures(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        poller = ServingPoller(core_of(fleet))
        await poller.look()
        assert set(poller.figures) == {"a"}
        server = psutil.Process(seen(fleet, "a").pid)
        server.suspend()
        try:
            await poller.look()
        finally:
            server.resume()
        assert poller.figures == {}
        async with asyncio.timeout(LIMIT):
            while set(poller.figures) != {"a"}:
                await poller.look()
