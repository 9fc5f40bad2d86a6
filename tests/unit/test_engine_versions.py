"""What each version of vLLM is trusted with."""

from __future__ import annotations

import pytest

from vllm_sleep_tui.engine.versions import capabilities


@pytest.mark.parametrize("version", ["0.11.0", "0.14.1", "0.16.0", "0.22.1", "0.23.0.dev3"])
def test_older_versions_are_refused_sleep_with_the_reason(version: str) -> None:
    able = capabilities(version)

    assert able.why_not is not None
    assert "0.24" in able.why_not
    assert version in able.why_not


@pytest.mark.parametrize(
    ("version", "retry_wake"),
    [("0.24.0", False), ("0.26.0+cu130", True), ("0.31.0", True), ("0.32.0", True), ("0.33.0rc1", True)],
)
def test_each_version_gets_its_own_rules(version: str, retry_wake: bool) -> None:
    able = capabilities(version)

    assert able.why_not is None
    assert able.note is None
    assert able.retry_wake is retry_wake


@pytest.mark.parametrize("version", ["0.41.0", "1.0.0", "nightly-abc"])
def test_unknown_versions_run_on_the_newest_rules_and_say_so(version: str) -> None:
    able = capabilities(version)

    assert able.why_not is None
    assert able.retry_wake
    assert able.note is not None
    assert version in able.note
