"""The panel over the real fleet, with real processes of the simulator."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from screen_text import lines_of, text_of, until, until_seen
from textual.pilot import Pilot

from tests.fleet.beside import core_of
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.state.config_watch import ConfigWatch
from vllm_sleep_tui.tui.theme import package_folder

SPEED = 40


@pytest.fixture
def demo(tmp_path: Path) -> LoadedConfig:
    (tmp_path / "state").mkdir()
    return load(write_demo(tmp_path / "demo", SPEED))


@asynccontextmanager
async def real_panel(
    demo: LoadedConfig, state_dir: Path, *, leads: bool = False
) -> AsyncIterator[tuple[Pilot[None], Fleet]]:
    async with Fleet(demo, state_dir, leads=leads) as fleet:
        app = PanelApp(fleet, state_dir=state_dir, theme_folders=[package_folder()])
        try:
            async with app.run_test(size=(120, 40), notifications=True) as pilot:
                await until_seen(pilot, "SIMULATED", "qwen")
                yield pilot, fleet
        finally:
            await app.operations.close()
            running = [model.name for model in fleet.snapshot().models if model.state is not State.STOPPED]
            await fleet.stop(running, force=True)


def row_of(pilot: Pilot[None], name: str) -> str:
    return next((line for line in lines_of(pilot.app) if re.search(rf"│ [ ▶▸] ▌ {name} ", line)), "")


async def test_one_key_starts_a_model_and_the_next_switches_and_another_panel_agrees(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("enter")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")
        await pilot.press("down", "enter")
        await until(pilot, lambda: "● awake" in row_of(pilot, "phi"), "phi awake")
        assert "◐ asleep L1" in row_of(pilot, "qwen")
        await pilot.press("up")
        await until_seen(pilot, "enter → qwen")
        await pilot.press("enter")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake again")
        await until_seen(pilot, "last switch to qwen", "sleep", "wake", "prove")
        async with Fleet(demo, tmp_path / "state") as other:
            states = {model.name: model.state for model in other.snapshot().models}
            assert states["qwen"] is State.AWAKE
            assert states["phi"] is State.ASLEEP


async def test_a_wake_takes_the_same_in_the_table_and_under_enter_and_its_proof_is_in_it(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, fleet):
        for model in ("qwen", "phi", "qwen"):
            await fleet.switch(model)
        last = fleet.snapshot().model("qwen").last_switch
        assert last is not None
        await pilot.press("s")
        await until_seen(pilot, "enter → qwen  ≈ ")
        told = re.search(r"enter → qwen  ≈ (\S+ m?s)", text_of(pilot.app))
        assert told is not None
        await until(pilot, lambda: told[1] in row_of(pilot, "qwen"), "the same time in its row")
        figure, unit = told[1].split()
        seconds = float(figure) / (1000 if unit == "ms" else 1)
        known = core_of(fleet).model("qwen").footprint
        assert known.times["wake1"][-1] > (last.phases["wake"] or 0) + (last.phases["prove"] or 0)
        assert seconds == pytest.approx(known.typical("wake1"), abs=0.005)
        await pilot.press("x")
        await until_seen(pilot, "Stop qwen?")
        await pilot.press("y")
        await until_seen(pilot, "enter → qwen  ≈ ", "○ stopped")
        start = re.search(r"enter → qwen  ≈ (\S+ s)", text_of(pilot.app))
        assert start is not None
        await until(pilot, lambda: f"start {start[1]}" in row_of(pilot, "qwen"), "its start in its row")


async def test_a_chat_with_a_stopped_model_starts_it_and_streams_its_answer(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("c", *"hello", "enter")
        await until_seen(pilot, "Start qwen?")
        await pilot.press("y")
        await until_seen(pilot, "started in", "TTFT", "tok/s", "hello")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")


async def test_stopping_all_on_quit_leaves_nothing_and_the_log_can_be_read_before(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, fleet):
        await pilot.press("u")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")
        await pilot.press("l")
        await until_seen(pilot, "Log of qwen", "Application startup complete")
        await pilot.press("escape")
        await until_seen(pilot, "last start of qwen")
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?")
        await pilot.press("s")
        await until(pilot, lambda: not pilot.app.is_running or pilot.app._exit, "the end")
        assert all(model.state is State.STOPPED for model in fleet.snapshot().models)


async def test_a_death_at_night_is_explained_in_three_keys_as_the_docs_show_it(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    def plain(text: str) -> str:
        return re.sub(r"\d+", "0", re.sub(r"[│\s]+", " ", text))

    page = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    walk = page.partition("<!-- night:")[2].partition("<!-- /night -->")[0]
    head, failure, words = re.findall(r"```\n(.*?)\n```", walk, re.DOTALL)
    async with real_panel(demo, tmp_path / "state", leads=True) as (pilot, fleet):
        await pilot.press("enter")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")
        server = fleet.snapshot().models[0].pid
        engine = Path(f"/proc/{server}/task/{server}/children").read_text().split()[0]
        os.kill(int(engine), signal.SIGKILL)
        # The panel started it again, and nobody has looked yet.
        await until(pilot, lambda: plain(head) in plain(text_of(pilot.app)), head)
        await pilot.press("n", "f")
        await until(pilot, lambda: plain(failure) in plain(text_of(pilot.app)), failure)
        await pilot.press("l")
        for line in words.splitlines():  # what it says of its shutdown may stand between them
            await until(pilot, lambda line=line: plain(line) in plain(text_of(pilot.app)), line)
        # Seen, so the head is quiet; the event leads to that server's words all the same.
        await pilot.press("escape")
        await until(pilot, lambda: "died, restarted" not in text_of(pilot.app), "a quiet head")
        await pilot.press("l")
        await until_seen(pilot, "EngineDeadError", "failed: The engine process was killed. What follows")


async def test_escape_during_a_start_asks_and_leaves_the_model_stopped(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    slow = load(write_demo(tmp_path / "slow", 4))  # so that it still starts when escape is heard
    async with real_panel(slow, tmp_path / "state") as (pilot, fleet):
        await pilot.press("enter")
        await until_seen(pilot, "switching to qwen")
        await until(pilot, lambda: fleet.snapshot().model("qwen").state is State.STARTING, "the start")
        await pilot.press("escape")
        await until_seen(pilot, "Stop the start of qwen?", "What it has loaded so far is lost")
        await pilot.press("escape")  # once too often: it starts on
        await until(pilot, lambda: "Stop the start" not in text_of(pilot.app), "the question's end")
        assert fleet.snapshot().model("qwen").state is State.STARTING
        await pilot.press("escape")
        await until_seen(pilot, "Stop the start of qwen?")
        await pilot.press("y")
        await until(pilot, lambda: "switching to qwen" not in text_of(pilot.app), "the end of the switch")
        await until(pilot, lambda: "○ stopped" in row_of(pilot, "qwen"), "qwen stopped")
        assert "did not work" not in text_of(pilot.app)


async def test_a_refusal_is_over_when_somebody_has_done_what_it_asked_for(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("w")
        await until_seen(pilot, "waking qwen did not work", "Start it (key u, or `start qwen`).")
        async with Fleet(demo, tmp_path / "state") as other:
            await other.start(["qwen"])
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")
        await until(pilot, lambda: "waking qwen did not work" not in text_of(pilot.app), "its end")
        assert "!" not in row_of(pilot, "qwen")


async def test_what_an_answer_costs_is_said_and_asked_and_a_sleep_meanwhile_drains(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, fleet):
        await fleet.start(["qwen"])
        await fleet.start(["phi"])
        await fleet.switch("qwen")
        await until(pilot, lambda: "● awake" in row_of(pilot, "qwen"), "qwen awake")
        await pilot.press("down")
        await until_seen(pilot, "phi ◐ asleep", "puts qwen to sleep")
        await pilot.press("c", *"hello", "enter")
        await until_seen(pilot, "Switch to phi?", "leeps qwen")
        assert fleet.snapshot().model("qwen").state is State.AWAKE
        await pilot.press("y")
        await until_seen(pilot, "prove", "phi, simulated")
        await pilot.press("escape", "s")
        await until(pilot, lambda: "◐ asleep" in row_of(pilot, "phi"), "phi asleep")
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "the answer")  # type: ignore[attr-defined]
        await until_seen(pilot, "woke in", "tok/s")
        assert "cut off" not in text_of(pilot.app)  # it was heard to its end
        await until_seen(pilot, "phi: asleep L1")  # which the chat tells, too


async def test_a_config_that_changes_on_disk_is_heeded_with_what_changed_told_and_a_wrong_one_is_not(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    written = demo.path.read_text()
    async with Fleet(demo, tmp_path / "state") as fleet:
        watch = ConfigWatch(demo, lambda _: True)
        app = PanelApp(fleet, state_dir=tmp_path / "state", theme_folders=[package_folder()], watch=watch)
        async with app.run_test(size=(120, 40), notifications=True) as pilot:
            await until_seen(pilot, "▌ big")
            await pilot.press("end")
            await until_seen(pilot, "Chat with big")
            demo.path.write_text(written.replace("  big:", "  large:"))
            await until_seen(pilot, "large is new", "big is no longer in the config", "▌ large")
            await until_seen(pilot, "Chat with qwen")  # the selected one is gone
            app.clear_notifications()
            demo.path.write_text(written.replace("gpus: [0, 1]", "gpus: [0, 7"))
            await until_seen(pilot, "The old one holds.", "▌ large")
            app.clear_notifications()
            demo.path.write_text(written)
            await until_seen(pilot, "large is no longer in the config", "▌ big")
            await pilot.press("n")  # it is kept, for whoever did not look
            await until_seen(pilot, "big   ≡ config: is new", "large ≡ config: is no longer in the config")
        await app.operations.close()
