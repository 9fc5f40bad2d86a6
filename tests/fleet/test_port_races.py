"""A port that is taken inside vLLM: named as such, and worth a second start where nobody chose it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine, write_config

DATA = Path(__file__).parents[1] / "unit/data"
Make = Callable[..., CommandLine]


@pytest.fixture
def panel(tmp_path: Path) -> Iterator[Make]:
    """Makes a command line whose vLLM fails `times` with what real ones logged, then is the simulator."""
    made: list[CommandLine] = []

    def make(recording: str, *, times: int, **settings: Any) -> CommandLine:
        binary = tmp_path / "vllm"
        binary.write_text(
            "#!/bin/sh\n"
            'case "$*" in *--help=all* | --version) exit 1 ;; esac\n'  # asked what it knows: no start
            f"echo call >> {tmp_path}/calls\n"
            f'if [ "$(wc -l < {tmp_path}/calls)" -le {times} ]; then cat {DATA}/{recording}; exit 1; fi\n'
            f'exec {sys.executable} -m vllm_sleep_tui.simulator "$@"\n'
        )
        binary.chmod(0o755)
        model = {"model": "sim/1GiB", "gpus": [], "env": {"VLLM_SIM_TIMES": "instant"}, **settings}
        model["args"] = {"max-model-len": 2048, **settings.get("args", {})}
        config = write_config(tmp_path / "vllm-sleep-tui.yaml", [str(binary)], {"m": model})
        made.append(CommandLine(config, tmp_path / "state"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def calls(tmp_path: Path) -> int:
    """How often vLLM was started."""
    return len((tmp_path / "calls").read_text().splitlines())


@pytest.mark.parametrize("recording", ["cause-inner-port.txt", "cause-port-in-use.txt"])
def test_a_lost_race_for_a_port_that_nobody_chose_is_run_once_more(
    panel: Make, tmp_path: Path, recording: str
) -> None:
    started = panel(recording, times=1).run("start", "m")
    assert started.returncode == 0, started.stderr
    assert "once more" in started.stderr
    assert calls(tmp_path) == 2


def test_a_race_that_is_lost_again_is_told(panel: Make, tmp_path: Path) -> None:
    failed = panel("cause-inner-port.txt", times=9).run("start", "m")
    assert failed.returncode == 1
    assert "A port that vLLM uses inside is taken: tcp://*:15557." in failed.stderr
    assert "kv-events-config" in failed.stderr
    assert calls(tmp_path) == 2


def test_a_port_that_the_config_names_is_not_tried_again(panel: Make, tmp_path: Path) -> None:
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": "tcp://*:15557"}
    failed = panel("cause-inner-port.txt", times=9, args={"kv-events-config": events}).run("start", "m")
    assert failed.returncode == 1
    assert "A port that vLLM uses inside is taken: tcp://*:15557." in failed.stderr
    assert "is taken by" not in failed.stderr
    assert calls(tmp_path) == 1
