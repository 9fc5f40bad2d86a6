"""What each version of vLLM is trusted with."""

from __future__ import annotations

import pytest

from vllm_sleep_tui.engine.versions import SLEEP_PATHS, capabilities


@pytest.mark.parametrize("version", ["0.11.0", "0.14.1", "0.16.0", "0.22.1", "0.23.0.dev3"])
def test_older_versions_are_refused_sleep_with_the_reason(version: str) -> None:
    able = capabilities(version)

    assert not able.sleep
    assert able.why_not is not None
    assert "0.24" in able.why_not
    assert version in able.why_not


@pytest.mark.parametrize(
    ("version", "retry_wake", "json_replies", "refuses_while_paused"),
    [
        ("0.24.0", False, False, False),
        ("0.26.0+cu130", True, False, False),
        ("0.31.0", True, False, False),
        ("0.32.0", True, True, False),
        ("0.33.0rc1", True, True, True),
    ],
)
def test_each_version_gets_its_own_rules(
    version: str, retry_wake: bool, json_replies: bool, refuses_while_paused: bool
) -> None:
    able = capabilities(version)

    assert able.sleep
    assert able.note is None
    assert able.retry_wake is retry_wake
    assert able.json_replies is json_replies
    assert able.level_checked is json_replies
    assert able.refuses_while_paused is refuses_while_paused


@pytest.mark.parametrize("version", ["0.41.0", "1.0.0", "nightly-abc"])
def test_unknown_versions_run_on_the_newest_rules_and_say_so(version: str) -> None:
    able = capabilities(version)

    assert able.sleep
    assert able.refuses_while_paused
    assert able.note is not None
    assert version in able.note


def test_a_server_without_the_sleep_routes_is_refused_with_the_cure() -> None:
    able = capabilities("0.32.0", frozenset({"/health", "/is_sleeping"}))

    assert not able.sleep
    assert able.why_not is not None
    assert "/sleep, /wake_up" in able.why_not
    assert "VLLM_SERVER_DEV_MODE=1" in able.why_not
    assert capabilities("0.32.0", SLEEP_PATHS | {"/health"}).sleep
