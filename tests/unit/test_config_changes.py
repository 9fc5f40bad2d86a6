"""What a changed config is told to be, and that it is kept once however many have the file open."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from vllm_sleep_tui.config.changes import changes
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.types import Config
from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.store.history import History


def config(folder: Path, models: str) -> Config:
    file = folder / "vllm-sleep-tui.yaml"
    file.write_text(f"vllm_command: [vllm]\nmodels:\n  qwen: {models}\n")
    return load(file).config


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("{model: x/y, level: 1}", "qwen changed (level)"),
        ("{model: x/y, aliases: [gpt]}", "qwen changed (alias gpt added)"),
        ("{model: x/y, aliases: [small], env: {A: b}}", "qwen changed (alias small added, env A)"),
        (
            "{model: x/y, args: {max-model-len: 9, dtype: half}}",
            "qwen changed (args max-model-len, args dtype)",
        ),
    ],
)
def test_what_changed_is_told_by_key_and_without_its_value(tmp_path: Path, after: str, words: str) -> None:
    before = config(tmp_path, "{model: x/y}")
    assert [change.sentence for change in changes(before, config(tmp_path, after), {})] == [words]


def test_what_runs_is_told_to_need_a_restart(tmp_path: Path) -> None:
    before = config(tmp_path, "{model: x/y, aliases: [old]}")
    (change,) = changes(before, config(tmp_path, "{model: x/y}"), {"qwen": 7})
    assert change.sentence == "qwen changed and needs a restart (alias old removed): `restart qwen`"
    assert change.needs_care


def test_what_needs_a_restart_is_told_apart_from_what_does_not(tmp_path: Path) -> None:
    before = config(tmp_path, "{model: x/y}")
    after = config(tmp_path, "{model: x/y, idle: {sleep_after: 10m}, aliases: [new], vllm_command: [other]}")
    assert [change.sentence for change in changes(before, after, {"qwen": 7})] == [
        "qwen changed and needs a restart (alias new added, vllm_command): `restart qwen`",
        "qwen changed (idle)",
    ]


def test_two_that_heed_the_same_change_keep_it_once_and_the_way_back_is_another(tmp_path: Path) -> None:
    def told(version: str, model: str = "qwen", detail: str = "changed (level)") -> FleetEvent:
        return FleetEvent(time=1.0, kind=Kind.CONFIG, model=model, detail=detail, config=version)

    with closing(History(tmp_path)) as panel, closing(History(tmp_path)) as serve:
        panel.record_event(told("b"))
        panel.record_event(told("b", ""))
        panel.record_event(told("b", "", "gateway changed"))
        panel.latest_events(1)  # it is written
        serve.record_event(told("b"))
        serve.record_event(told("b", ""))
        serve.record_event(told("b", "", "gateway changed"))
        serve.record_event(told("a"))
        serve.latest_events(1)
        panel.record_event(told("b again"))
        kept = panel.latest_events(9)
    assert [(event.model, event.config) for event in kept] == [
        ("qwen", "b"), ("", "b"), ("", "b"), ("qwen", "a"), ("qwen", "b again"),
    ]  # fmt: skip
    assert kept[0].sentence() == "config: changed (level)"
    assert kept[1].models == []
