"""The memory box: who holds what, by name, and the lines that matter."""

from __future__ import annotations

from pathlib import Path

import msgspec
from screen_text import lines_of, panel, until_seen
from scripted_fleet import ScriptedFleet, gib

from vllm_sleep_tui.fleet.snapshot import GpuProcess


async def test_strangers_on_a_gpu_are_named_and_the_small_ones_counted_together(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    (gpu,) = fleet.now.gpus
    strangers = (
        GpuProcess(pid=9, user="ann", command="/opt/venv/bin/python /home/ann/train.py", bytes=gib(3)),
        GpuProcess(pid=10, user="bob", command="game", bytes=gib(0.01)),
    )
    gpu = msgspec.structs.replace(gpu, used_bytes=gib(75.7), others=strangers)
    fleet.now = msgspec.structs.replace(fleet.now, gpus=(gpu,))
    async with panel(fleet, tmp_path, size=(160, 40)) as pilot:
        await until_seen(pilot, "ann: python train.py 3.0", "others 0.5")
        assert "bob" not in "\n".join(lines_of(pilot.app))


async def test_the_ram_up_to_which_level_1_may_pin_is_marked_where_a_model_may(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "┃ level 1 up to 118.8")  # a twentieth of 125 GiB stays free
    for model in fleet.now.models:
        fleet.change(model.name, configured_level="2")
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "RAM")
        assert "level 1 up to" not in "\n".join(lines_of(pilot.app))


async def test_what_rounds_to_nothing_has_no_part_of_the_bar(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.change("phi", pinned_bytes=gib(0.01))
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "qwen 3.0")
        assert "phi 0.0" not in "\n".join(lines_of(pilot.app))
