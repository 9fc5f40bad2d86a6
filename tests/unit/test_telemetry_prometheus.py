"""Prometheus' text, rates and percentiles, and the history ring."""

from __future__ import annotations

import math

import pytest

from vllm_sleep_tui.telemetry import prometheus
from vllm_sleep_tui.tui.state.past import Point, Ring

# In the shape that vLLM 0.32 answers, "transcripts/metrics-idle.txt".
PAGE = r"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny-a"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny-a"} 3.0
vllm:num_requests_running_other{engine="0"} 99.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="a \"b\"\\c\n{d}"} 7.0 1795420885475
process_resident_memory_bytes 6.02824704e+08
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="tiny-a"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.2",model_name="tiny-a"} 30.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="tiny-a"} 40.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.1",model_name="tiny-a"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="0.2",model_name="tiny-a"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="1",le="+Inf",model_name="tiny-a"} 10.0
vllm:broken{engine="0" 1.0
vllm:broken
vllm:broken{} many
"""
RUNNING = "vllm:num_requests_running"


def test_only_wanted_names_are_read_with_labels_and_values() -> None:
    scrape = prometheus.parse(PAGE, frozenset({RUNNING, "process_resident_memory_bytes"}))
    assert scrape == {
        RUNNING: [
            ({"engine": "0", "model_name": "tiny-a"}, 2.0),
            ({"engine": "1", "model_name": "tiny-a"}, 3.0),
        ],
        "process_resident_memory_bytes": [({}, 602824704.0)],
    }


def test_labels_are_unescaped_and_a_time_stamp_is_not_the_value() -> None:
    ((labels, value),) = prometheus.parse(PAGE, frozenset({"vllm:request_success_total"})).popitem()[1]
    assert labels["model_name"] == 'a "b"\\c\n{d}'
    assert labels["finished_reason"] == "stop"
    assert value == 7.0


def test_lines_that_make_no_sense_are_skipped() -> None:
    assert prometheus.parse(PAGE, frozenset({"vllm:broken"})) == {}


def test_a_total_sums_what_carries_the_labels_and_is_none_without_any() -> None:
    scrape = prometheus.parse(PAGE, frozenset({RUNNING}))
    assert prometheus.total(scrape, RUNNING) == 5.0
    assert prometheus.total(scrape, RUNNING, engine="1") == 3.0
    assert prometheus.total(scrape, RUNNING, engine="2") is None
    assert prometheus.total(scrape, "vllm:absent") is None


@pytest.mark.parametrize(
    ("before", "now", "seconds", "expected"),
    [
        (10.0, 30.0, 2.0, 10.0),
        (30.0, 10.0, 2.0, 5.0),
        (None, 1.0, 1.0, None),
        (1.0, None, 1.0, None),
        (1.0, 2.0, 0.0, None),
    ],
)
def test_a_rate_survives_a_counter_that_started_again(
    before: float | None, now: float | None, seconds: float, expected: float | None
) -> None:
    assert prometheus.rate(before, now, seconds) == expected


def test_buckets_are_summed_over_engines() -> None:
    name = "vllm:time_to_first_token_seconds"
    counts = prometheus.buckets(prometheus.parse(PAGE, frozenset({f"{name}_bucket"})), name)
    assert counts == {0.1: 20.0, 0.2: 40.0, math.inf: 50.0}


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ({0.1: 20, 0.2: 40, math.inf: 50}, 0.2, 0.05),
        ({0.1: 20, 0.2: 40, math.inf: 50}, 0.6, 0.15),
        ({0.1: 20, 0.2: 40, math.inf: 50}, 0.99, 0.2),
        ({0.1: 0, 0.2: 40, math.inf: 40}, 0.0, 0.1),
        ({0.1: 0, 0.2: 40, math.inf: 40}, 1.0, 0.2),
        ({0.1: 0, 0.2: 0, math.inf: 0}, 0.5, None),
        ({math.inf: 9}, 0.5, None),
        ({}, 0.5, None),
    ],
)
def test_a_percentile_lies_evenly_within_its_bucket(
    counts: dict[float, float], share: float, expected: float | None
) -> None:
    assert prometheus.percentile(counts, share) == (None if expected is None else pytest.approx(expected))


def test_a_percentile_between_two_scrapes_counts_only_what_is_new_unless_the_server_restarted() -> None:
    before, now = {0.1: 20.0, math.inf: 20.0}, {0.1: 20.0, math.inf: 30.0}
    assert prometheus.buckets_since(before, now) == {0.1: 0.0, math.inf: 10.0}
    assert prometheus.buckets_since(now, before) == before
    assert prometheus.buckets_since({}, now) == now


def test_a_ring_keeps_the_newest_and_gives_what_is_recent() -> None:
    ring = Ring(3)
    assert ring.latest is None
    for second in range(5):
        ring.append(second, None if second == 3 else second * 10.0)
    assert len(ring) == 3
    assert ring.latest == Point(4, 40.0)
    assert ring.since(3) == (Point(3, None), Point(4, 40.0))
    assert ring.since(0) == (Point(2, 20.0), Point(3, None), Point(4, 40.0))
