"""The screen of the GPUs: figures, graphs over time, and the processes as trees."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from screen_text import lines_of, panel, until, until_seen
from scripted_fleet import NOW, ScriptedFleet, gib

from vllm_sleep_tui.fleet.snapshot import HeldProcess
from vllm_sleep_tui.tui.drawing.graphs import buckets, graph
from vllm_sleep_tui.tui.state.past import Point, Series


def held(
    pid: int, parent: int | None, model: str | None, command: str, vram: float = 0.0, ram: float = 0.5
) -> HeldProcess:
    return HeldProcess(
        pid=pid,
        parent=parent,
        model=model,
        user="ada" if model else "bob",
        command=command,
        vram_by_gpu={"0": gib(vram)} if vram else {},
        ram_bytes=gib(ram),
    )


PROCESSES = (
    held(100, None, "qwen", "keeper"),
    held(101, 100, "qwen", "vllm serve example/qwen", ram=2.0),
    held(102, 101, "qwen", "VLLM::EngineCore", vram=69.2, ram=3.0),
    held(200, None, "phi", "keeper"),
    held(201, 200, "phi", "VLLM::EngineCore", vram=1.6, ram=40.0),
    held(900, None, None, "python train.py [/b] \x1b[31m", vram=9.0),
)


def fleet_of(gpus: int = 1, **gpu: object) -> ScriptedFleet:
    fleet = ScriptedFleet()
    one = msgspec.structs.replace(fleet.now.gpus[0], **gpu)
    many = tuple(
        msgspec.structs.replace(one, index=index, uuid=f"GPU-{index}", name=f"Card {index}")
        for index in range(gpus)
    )
    fleet.now = msgspec.structs.replace(fleet.now, gpus=many)
    fleet.held = PROCESSES
    return fleet


def at(lines: list[str], text: str) -> int:
    return next(index for index, line in enumerate(lines) if text in line)


async def test_a_card_says_all_it_reads_and_why_it_is_slowed(tmp_path: Path) -> None:
    fleet = fleet_of(power_limit_watts=700, sm_clock_mhz=1980, throttle=("power cap",))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("g")
        await until_seen(
            pilot,
            "GPU 0  Card 0",
            "87 % busy   72.9 / 79.6 GiB   61 °C   412 of 700 W   slowed by power cap   1980 MHz",
        )
        await until_seen(pilot, "100 %┤", "−10 min", "memory")
        await pilot.press("plus")
        await until_seen(pilot, "−1 h")
        await pilot.press("escape")
        await until_seen(pilot, "last switch to qwen")


async def test_eight_cards_are_in_sight_and_none_cuts_a_figure(tmp_path: Path) -> None:
    fleet = fleet_of(8, power_limit_watts=700, sm_clock_mhz=1980, throttle=())
    async with panel(fleet, tmp_path, size=(80, 24)) as pilot:
        await pilot.press("g")
        await until_seen(pilot, *(f"GPU {index}  Card {index}" for index in range(6)))
        assert not [line for line in lines_of(pilot.app) if "% busy" in line and "…" in line]
        await pilot.resize_terminal(120, 40)
        await until_seen(pilot, *(f"GPU {index}  Card {index}" for index in range(8)), "412 of 700 W")
        await pilot.resize_terminal(200, 60)
        # The processes are few: what they leave goes to the graphs.
        await until_seen(pilot, "full speed allowed", "−10 min", "50┤")
        await pilot.resize_terminal(60, 20)
        await until_seen(pilot, "87 % busy  72.9/79.6 GiB")
        assert not [line for line in lines_of(pilot.app) if "% busy" in line and "…" in line]


async def test_a_card_that_tells_nothing_shows_no_zero(tmp_path: Path) -> None:
    fleet = fleet_of(used_bytes=None, total_bytes=None, utilization=None, power_watts=None, temperature=None)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("g")
        await until_seen(pilot, "? % busy   ? / ? GiB", "memory unknown")


async def test_processes_stand_as_trees_under_their_models_and_o_sorts_them(tmp_path: Path) -> None:
    async with panel(fleet_of(), tmp_path, size=(120, 50)) as pilot:
        await pilot.press("g")
        await until_seen(pilot, "Processes by VRAM", "python train.py [/b]", "└ VLLM::EngineCore")
        lines = lines_of(pilot.app)
        assert at(lines, "● qwen  ") < at(lines, "● phi ") < at(lines, "● others")
        assert lines[at(lines, "● qwen  ")].split()[2:] == ["qwen", "0", "69.2", "5.5", "│"]
        serve = lines[at(lines, "vllm serve example/qwen")]
        assert serve.index("└") == lines[at(lines, "└ keeper")].index("└") + 2
        assert "bob" in lines[at(lines, "train.py")]
        await pilot.press("o")
        await until_seen(pilot, "Processes by RAM")
        lines = lines_of(pilot.app)
        assert at(lines, "● phi ") < at(lines, "● qwen  ")


async def test_the_screen_stands_still_while_it_is_not_in_front(tmp_path: Path) -> None:
    fleet = fleet_of()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("g")
        await until_seen(pilot, "Processes by VRAM")
        await until(pilot, lambda: fleet.asked_processes > 1, "a second look")
        await pilot.press("escape")
        await until_seen(pilot, "last switch to qwen")
        seen = fleet.asked_processes
        await pilot.pause(2.5)
        assert fleet.asked_processes == seen


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40), (200, 60)])
@pytest.mark.parametrize("gpus", [1, 8])
async def test_every_size_and_many_cards_fit(tmp_path: Path, size: tuple[int, int], gpus: int) -> None:
    async with panel(fleet_of(gpus), tmp_path, size=size) as pilot:
        await pilot.press("g")
        await until_seen(pilot, "GPU 0", "Processes by VRAM", "● qwen", "esc back")
        assert all(len(line) <= size[0] for line in lines_of(pilot.app))


def test_a_series_keeps_the_last_minutes_finely_and_the_day_coarsely() -> None:
    series = Series()
    for second in range(7200):
        series.append(NOW + second, float(second % 100))
    now = NOW + 7200
    assert len(series.since(now - 300)) == 300
    hour = series.since(now - 3600)
    assert 600 + 140 < len(hour) < 600 + 170
    assert [point.time for point in hour] == sorted(point.time for point in hour)
    assert hour[0].time < now - 3500


def test_readings_are_gathered_into_stretches_of_time_and_gaps_stay_gaps() -> None:
    points = [Point(100.0, 10.0), Point(101.0, 30.0), Point(105.0, None), Point(109.9, 50.0)]
    assert buckets(points, 110.0, 10.0, 5) == ((-9.0, 20.0), (-1.0, 50.0))


def test_a_graph_has_its_size_and_its_curve_apart_from_its_axes() -> None:
    lines = graph(((-500.0, 0.0), (-300.0, 100.0), (-10.0, 50.0)), 600.0, "10 minutes", (60, 8), "m1")
    assert len(lines) == 8
    assert {sum(len(text) for text, _ in line) for line in lines} == {60}
    assert {paint for line in lines for _, paint in line} == {"m1", "muted"}
    assert graph((), 600.0, "10 minutes", (60, 8), "m1")
