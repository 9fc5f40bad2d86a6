"""Files and texts of any content: logs, metrics, records, keepers' words. None ends in an exception."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.causes import diagnose
from vllm_sleep_tui.engine.logs import LogTail, PhaseReader
from vllm_sleep_tui.fleet.keeper_client import KeeperStatus, read_status
from vllm_sleep_tui.fleet.observe.orphans import find_orphans
from vllm_sleep_tui.fleet.operations.acquire import describe
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import decode_holder
from vllm_sleep_tui.fleet.store.records import Record, RecordStore, encode
from vllm_sleep_tui.fleet.survey import read_once
from vllm_sleep_tui.sizing.footprints import FootprintStore
from vllm_sleep_tui.telemetry import prometheus
from vllm_sleep_tui.text import clean

WORKER = r"(\(\w{1,9} pid=\d{1,4}\) )?"
FIGURE = r"[0-9.]{1,6}"
LINES = st.one_of(
    st.from_regex(WORKER + "Model loading took " + FIGURE + " GiB", fullmatch=True),
    st.from_regex(WORKER + "Available KV cache memory: " + FIGURE + " GiB", fullmatch=True),
    st.from_regex(
        "It took 1 s, sleep freed " + FIGURE + " GiB, of which " + FIGURE + " GiB is backed up in CPU"
    ),
    st.from_regex(r"checkpoint shards: {1,3}\d{1,5}% Completed \|", fullmatch=True),
    st.from_regex(r"(\w{1,5}\.)?(Value|Runtime|Validation)Error: .{0,9}", fullmatch=True),
    st.sampled_from(
        [
            "Model loading took " + "9" * 400 + " GiB",
            "EngineCore failed to start.",
            "Traceback (most recent call last):",
        ]
    ),
    st.text(max_size=20),
)
LOGS = st.lists(LINES, max_size=6).map("\n".join)
NAMES = ("a", "b_bucket", "b_sum")
METRIC = st.one_of(
    st.from_regex(
        r'(a|b_bucket|b_sum)\{(le="[0-9.+Inf-]{0,4}",?)?\} ([0-9.e+-]{0,5}|NaN|[+-]Inf)', fullmatch=True
    ),
    st.from_regex(r"(a|b_bucket) .{0,9}", fullmatch=True),
    st.sampled_from(['a{x="\\', 'a{x="\\n"} 1', "a 1e999", "a{ 1", 'b_bucket{le="nan"} 3', "a 1 2 3"]),
    st.text(max_size=12),
)


@settings(max_examples=200)
@given(LOGS, st.none() | st.integers(-70, 300))
@example("Model loading took 1..2 GiB", None)
@example("Model loading took . GiB", None)
def test_any_log_has_phases_figures_and_a_diagnosis(log: str, code: int | None) -> None:
    phases = PhaseReader()
    for line in log.splitlines():
        phases.feed(line)
    figures = phases.facts
    assert figures.weights_bytes is None or figures.weights_bytes >= 0
    found = diagnose(log, exit_code=code)
    assert found.reason
    assert found.cure
    assert clean(found.reason) == found.reason


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=30) | LINES.map(lambda line: line.encode(errors="replace")), max_size=5))
def test_any_bytes_of_a_log_are_lines(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.log"
    path.unlink(missing_ok=True)
    tail = LogTail(path)
    assert tail.read_new() == []
    for part in parts:
        with path.open("ab") as file:
            file.write(part)
        for line in tail.read_new():
            assert "\n" not in line


@settings(max_examples=200)
@given(st.lists(METRIC, max_size=8).map("\n".join), st.lists(METRIC, max_size=8).map("\n".join))
@example('b_bucket{le="1"} NaN\nb_bucket{le="+Inf"} 5', "")
def test_any_metrics_can_be_read_and_reckoned_with(before: str, now: str) -> None:
    scrapes = [prometheus.parse(text, frozenset(NAMES)) for text in (before, now)]
    totals = [prometheus.total(scrape, "a") for scrape in scrapes]
    prometheus.rate(*totals, 1.0)
    counts = [prometheus.buckets(scrape, "b") for scrape in scrapes]
    for share in (0.0, 0.5, 0.99, 1.0):
        prometheus.percentile(counts[1], share)
        prometheus.percentile(prometheus.buckets_since(*counts), share)


RECORD = Record(config="c", name="a", state=State.AWAKE, launch="l", port=1, secret="s")
GARBLED = st.one_of(
    st.binary(max_size=60),
    st.integers(0, 300).map(lambda cut: encode(RECORD)[:cut]),
    st.tuples(st.integers(0, 200), st.integers(0, 255)).map(
        lambda spot: encode(RECORD)[: spot[0]] + bytes([spot[1]]) + encode(RECORD)[spot[0] + 1 :]
    ),
)


@settings(max_examples=150)
@given(GARBLED)
@example(b"")
@example(b"\n\n")
@example(b"[" * 5_000 + b"\n00000000\n")
def test_any_record_is_read_or_set_aside(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "state"
    store = RecordStore(folder, Path("c.yaml"))
    for aside in store.folder.glob("*.broken-*"):
        aside.unlink()
    store.path("a").write_bytes(content)
    found = store.read("a")
    if found == RECORD:  # the garbled byte was the one that was there
        return
    assert found.state is State.FAILED
    assert "could not be read" in (found.reason or "")
    (aside,) = store.folder.glob("*.broken-*")
    assert aside.read_bytes() == content
    assert store.read("a") == found


WORDS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"[" * 5_000,
            b'{"launch": 3}',
            b'{"keeper": {"pid": "x"}}',
            b'{"unknown": ' + b"[" * 5_000,
            b"{}" + b"\0" * 9,
            b"null",
        ]
    ),
)


@settings(max_examples=150)
@given(WORDS)
def test_any_keepers_file_is_a_word_or_an_empty_one(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "a.keeper"
    path.write_bytes(content)
    assert isinstance(read_status(path), KeeperStatus)


@settings(max_examples=100)
@given(WORDS)
def test_any_footprints_are_figures_or_none(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "footprints.json").write_bytes(content)
    assert FootprintStore(folder).get("d", "v").weights is None


@pytest.mark.parametrize("until", ["1e308", "-1e308", "null", "0"])
def test_a_lock_of_another_user_cannot_write_on_our_terminal(until: str) -> None:
    escape = "\\u001b]0;x\\u0007"
    said = f'{{"user": "{escape}", "pid": 1, "operation": "{escape}sle\\nep", "since": 0, '
    said += f'"model": "{"m" * 999}"'
    who = decode_holder(f'{said}, "until": {until}}}'.encode())
    assert who is not None
    shown = describe(who)
    assert shown.isprintable()
    assert len(shown) < 200


def test_a_lock_with_nested_garbage_has_an_unknown_holder() -> None:
    assert decode_holder(b'{"x": ' + b"[" * 4_000) is None


CONFIG = {
    "vllm_command": ["/nowhere/vllm"],
    "simulated_gpus": [{"name": "Test", "memory": "24GiB"}],
    "models": {name: {"model": "x/y"} for name in ("a", "b", "c")},
}


@pytest.mark.parametrize(
    "content",
    [
        b'{"launch": "l", "unknown": ' + b"[" * 5_000,
        b"",
        b"\xff\x00garbage",
        b"[" * 5_000,
        b'{"launch": "l"}',
        b"{}\n00000000\n",
    ],
)
def test_status_on_top_of_garbage_shows_every_model(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(CONFIG))
    state = tmp_path / "home" / "vllm-sleep-tui"
    read_once(load(config), state)
    garble(state, config, content)
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), "status", "--json"]
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    shown = {model["name"]: model["state"] for model in json.loads(done.stdout)["models"]}
    assert shown == {"a": "failed", "b": "stopped", "c": "failed"}
    assert isinstance(find_orphans(state), tuple)  # whose members other tests may own


def garble(state: Path, config: Path, content: bytes) -> None:
    """Garbage in each file there may be: a record, a keeper's word, both, and what all models share."""
    store = RecordStore(state, config)
    for name, kind in (("a", "json"), ("b", "keeper"), ("c", "json"), ("c", "keeper")):
        store.path(name, kind).write_bytes(content)
    (store.folder / "other-00000000.json").write_bytes(content)
    for name in ("footprints.json", "history.db", "trusted.json"):
        (state / name).write_bytes(content)
    (state / "logs").mkdir()
    (state / "logs" / "a.log").write_bytes(content)
