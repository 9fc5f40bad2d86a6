"""The figures behind the advice: what was measured comes first, and each estimate is known to be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_checkpoints import PHI, write_model
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.advice import read_figures, read_machine
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.sizing.figures import Figures
from vllm_sleep_tui.sizing.footprints import Footprint
from vllm_sleep_tui.units import GIB

Made = Callable[..., Core]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Makes a core over two simulated 80 GiB GPUs and these models."""

    def make(**models: dict[str, Any]) -> Core:
        path = tmp_path / "vllm-sleep-tui.yaml"
        gpus = [{"name": "Test", "memory": "80GiB"}] * 2
        path.write_text(json.dumps({"simulated_gpus": gpus, "models": models}))
        (tmp_path / "state").mkdir(exist_ok=True)
        return Core(load(path), tmp_path / "state")

    return make


def only(core: Core) -> Figures:
    (found,) = read_figures(core)
    return found


def test_before_a_launch_all_is_estimated_from_the_files(made: Made, tmp_path: Path) -> None:
    write_model(tmp_path / "phi", PHI)
    found = only(made(phi={"model": "./phi"}))
    assert found.estimated == {"memory", "pinned", "start", "wake1", "wake2"}
    assert found.weights is not None
    assert found.weights / GIB == pytest.approx(7.3, rel=0.01)
    assert found.context == 4096 * 384 * 1024


def test_what_was_measured_takes_the_place_of_the_estimate(made: Made, tmp_path: Path) -> None:
    write_model(tmp_path / "phi", PHI)
    core = made(phi={"model": "./phi"})
    known = Footprint(
        awake={"0": 60 * GIB}, asleep={"0": GIB}, pinned=9 * GIB, times={"wake1": (0.3, 0.5, 0.4)}
    )
    core.footprints.note(core.digest("phi"), None, lambda _: known)
    found = only(core)
    assert (found.awake, found.asleep, found.pinned) == ({0: 60 * GIB}, {0: GIB}, 9 * GIB)
    assert found.wake1 == 0.4
    assert found.estimated == {"start", "wake2"}


def test_weights_that_the_log_told_for_all_gpus_are_shared_between_them(made: Made) -> None:
    core = made(big={"model": "not/here", "gpus": [0, 1], "args": {"tensor-parallel-size": 2}})
    core.footprints.note(core.digest("big"), None, lambda known: known.with_weights(20 * GIB))
    found = only(core)
    assert found.weights == 10 * GIB
    assert found.wake2 is not None
    assert "wake2" in found.estimated


def test_nothing_is_made_up_for_a_model_that_is_not_here(made: Made) -> None:
    found = only(made(new={"model": "not/here"}))
    assert (found.weights, found.pinned, found.start, found.context) == (None, None, None, None)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ({"load-format": "dummy"}, "dummy"),
        ({"load-format": "tensorizer"}, "`tensorizer`"),
        ({"enable-lora": True}, ""),
        ({"speculative_config": {"method": "ngram"}}, "draft"),
        ({"max-model-len": 4096}, ""),
    ],
)
def test_what_level_2_would_lose_is_said(made: Made, args: dict[str, Any], word: str) -> None:
    why = only(made(new={"model": "not/here", "args": args})).no_level2
    assert word in (why or "")
    assert bool(why) == bool(word)


def test_ram_for_servers_that_are_not_started_yet_is_kept_back(made: Made) -> None:
    one = read_machine(made(a={"model": "x"})).ram
    three = read_machine(made(a={"model": "x"}, b={"model": "x"}, c={"model": "x"})).ram
    assert one is not None
    assert three is not None
    assert one - three == pytest.approx(2 * 3.1 * GIB, rel=0.01)


def test_level_0_is_reckoned_with_where_the_vllm_has_our_sleep_mode(made: Made, tmp_path: Path) -> None:
    write_model(tmp_path / "phi", PHI)
    models = {
        "a": {"model": "./phi"},
        "b": {"model": "./phi", "kv_cache": "65GiB"},
        "c": {"model": "./phi", "args": {"gpu-memory-utilization": 0.8}, "kv_cache": "4GiB"},
        "d": {"model": "./phi", "level": 1},
    }
    core = made(**models)
    for name in models:
        model = core.model(name)
        model.read()
        model.write(vllm_version="0.26.0")
    a, b, c, d = read_figures(core)
    assert (set(a.stay), b.stay, c.stay) == ({"b", "c"}, (), ("a",))
    assert a.resident is not None
    assert a.kv_cache is not None
    assert b.kv_cache is not None
    assert b.kv_cache - a.kv_cache >= 2 * a.resident - GIB
    assert d.resident is None
    assert c.kv_note == "its args say gpu-memory-utilization, so kv_cache: 4GiB changes nothing"
