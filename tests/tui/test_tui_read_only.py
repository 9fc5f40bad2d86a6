"""A panel that only looks, over real processes of the simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from screen_text import lines_of, text_of, until, until_seen

from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.keys import KEYS
from vllm_sleep_tui.tui.theme import package_folder


async def test_it_shows_all_chats_with_who_is_awake_and_changes_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    loaded = load(write_demo(tmp_path / "demo", 40))
    config = loaded.path.read_bytes()
    async with Fleet(loaded, state) as owner:
        await owner.start(["qwen"])
        record = next((state / "records").glob("qwen-*.json"))
        before = record.read_bytes()
        try:
            async with Fleet(loaded, state, leads=True, read_only=True) as fleet:
                for refused in (
                    fleet.start(["phi"]),
                    fleet.stop(["qwen"], force=True),
                    fleet.restart(["qwen"]),
                    fleet.sleep("qwen"),
                    fleet.wake("qwen"),
                    fleet.switch("phi"),
                    fleet.apply("models: {}"),
                ):
                    with pytest.raises(RefusedError, match="only looks"):
                        await refused
                assert not fleet.is_leader
                app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()])
                async with app.run_test(size=(120, 40), notifications=True) as pilot:
                    await until_seen(pilot, "READ-ONLY", "SIMULATED", "● awake", "c chat")
                    assert "u start" not in lines_of(app)[-1]
                    await pilot.press("question_mark")
                    await until_seen(pilot, "Follow its log")
                    assert "Stop it (asks)" not in text_of(app)
                    await pilot.press("escape")
                    for key in (key for key in KEYS if key.changes):
                        await pilot.press(key.key)
                    assert not app.operations.running
                    assert app.screen is app.dashboard  # nothing was asked, no screen of changes was opened
                    await pilot.press("c", *"hello", "enter")
                    await until_seen(pilot, "tok/s")  # who is awake may be asked
                    await pilot.press("escape", "down", "c", *"hello", "enter")
                    await until_seen(pilot, "This panel only looks")
                    await pilot.press("escape", "q")  # asks nothing: what runs is not its business
                    await until(pilot, lambda: not app.is_running or app._exit, "the end")
                await app.operations.close()
            states = {model.name: model.state for model in owner.snapshot().models}
            assert states["qwen"] is State.AWAKE
            assert states["phi"] is State.STOPPED
            assert record.read_bytes() == before
            assert loaded.path.read_bytes() == config
        finally:
            await owner.stop(["qwen"], force=True)
