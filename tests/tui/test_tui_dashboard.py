"""The dashboard over a scripted fleet: what keys do and what the screen then says."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import NOW, ScriptedFleet, four_models, gib, starting
from textual.pilot import Pilot
from textual.widgets import Input

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet.snapshot import HostSnapshot, LastFailure, Progress
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.screens.dashboard import Dashboard
from vllm_sleep_tui.tui.screens.logs import WrappedLog
from vllm_sleep_tui.tui.state.view import View


async def find(pilot: Pilot[None], words: str) -> None:
    """Write into the palette, once it listens."""
    await pilot.press("ctrl+p")
    await until(pilot, lambda: isinstance(pilot.app.focused, Input), "the palette")
    await pilot.press(*words)


def line_with(lines: list[str], *words: str) -> str:
    found = [line for line in lines if all(word in line for word in words)]
    assert found, f"no line has {words}:\n" + "\n".join(lines)
    return found[0]


async def test_the_first_screen_says_who_is_awake_what_it_costs_and_that_it_is_simulated(
    tmp_path: Path,
) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        await until_seen(pilot, "72.9 / 79.6 GiB")
        lines = lines_of(pilot.app)
        assert "SIMULATED" in lines[0]
        assert "● qwen awake" in lines[0]
        assert "H100" in lines[0]
        assert "qwen 69.2" in line_with(lines, "GPU 0")
        assert "phi 10.1" in line_with(lines, "pinned", "servers")
        await until_seen(pilot, "0.46 s           –")  # from the history, which is asked behind the screen
        row = line_with(lines_of(pilot.app), "phi", "asleep L1")
        assert row.split("│")[1].split()[5:] == ["1.6", "12.0", "0.46", "s", "–"]


async def test_a_stopped_model_holds_nothing_and_an_unknown_figure_is_a_question_mark(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.change("coder", vram_bytes=None, vram_by_gpu=None)
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "vision")
        lines = lines_of(pilot.app)
        assert line_with(lines, "vision", "stopped").split("│")[1].split()[4:] == ["–"] * 4
        assert line_with(lines, "coder", "asleep").split("│")[1].split()[5] == "?"


async def test_enter_says_before_what_it_would_do_and_the_cursor_chooses_the_model(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        await until_seen(pilot, "Chat with qwen")
        await pilot.press("down")
        await until_seen(pilot, "enter → phi  ≈ 0.53 s", "then wakes", "71.0 after enter", "Chat with phi")
        await pilot.press("j", "j", "j")
        await until_seen(pilot, "enter → vision", "Chat with vision")
        await pilot.press("k")
        await until_seen(pilot, "enter → coder")


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("enter", ("switch", "phi")),
        ("s", ("sleep", "phi", None)),
        ("1", ("sleep", "phi", 1)),
        ("2", ("sleep", "phi", 2)),
        ("w", ("wake", "phi")),
        ("u", ("start", "phi")),
    ],
)
async def test_a_key_does_its_operation_on_the_selected_model(
    tmp_path: Path, key: str, call: tuple[object, ...]
) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "enter → phi")
        await pilot.press(key)
        await until(pilot, lambda: fleet.calls == [call], f"{call}")
        fleet.gate.set()


@pytest.mark.parametrize(("key", "verb"), [("x", "stop"), ("r", "restart")])
async def test_stop_and_restart_ask_first_and_enter_alone_does_nothing(
    tmp_path: Path, key: str, verb: str
) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press(key)
        await until_seen(pilot, f"{verb.capitalize()} qwen?")
        await pilot.press("enter")
        await until(pilot, lambda: f"{verb.capitalize()} qwen?" not in text_of(pilot.app), "the answer no")
        assert fleet.calls == []
        await pilot.press(key)
        await until_seen(pilot, f"{verb.capitalize()} qwen?")
        await pilot.press("y")
        await until(pilot, lambda: fleet.calls == [(verb, "qwen")], verb)
        fleet.gate.set()


async def test_all_are_started_slept_and_stopped_by_one_key_each_and_who_cannot_start_is_named(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    fleet.gate.set()
    fleet.change("coder", state=State.FAILED)
    wrong = {
        "vision": RefusedError("vision: no such folder.", "Name another."),
        "coder": RefusedError("No GPU 7."),
    }

    def leave_out() -> object:
        raise OperationError("vision: no such folder. Also: No GPU 7.", by_model=wrong)

    async with panel(fleet, tmp_path) as pilot:
        fleet.outcome = leave_out
        await pilot.press("U")
        # Who is awake comes first: the first one named ends awake.
        await until(pilot, lambda: fleet.calls == [("start", "qwen", "coder", "vision")], "the start")
        await until_seen(pilot, "2 models left out", "vision, coder")
        fleet.outcome = lambda: None
        await until(pilot, lambda: "!" in line_with(lines_of(pilot.app), "▌ vision"), "the mark of its row")
        await pilot.press("end")
        await until_seen(pilot, "starting vision did not work", "Name another.")
        await pilot.press("S")
        await until(pilot, lambda: fleet.calls[1:] == [("sleep", "qwen", None)], "the sleep")
        await pilot.press("X")
        await until_seen(pilot, "Stop 2 models?")
        await pilot.press("y")
        await until(pilot, lambda: fleet.calls[2:] == [("stop", "qwen"), ("stop", "phi")], "the stops")


async def test_a_long_step_shows_its_phase_its_detail_and_how_far_it_is(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.steps = [
        Progress(model="vision", operation="start", phase="loading", detail="weights 2 of 4", fraction=0.5)
    ]
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("end", "enter")
        await until_seen(pilot, "switching to vision", "loading  weights 2 of 4", "50 %")
        fleet.gate.set()
        await until(pilot, lambda: "weights 2 of 4" not in text_of(pilot.app), "the end of the step")


async def test_what_another_program_does_to_a_model_shows_with_its_expected_end(tmp_path: Path) -> None:
    fleet = ScriptedFleet(starting(four_models()))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("end")
        await until_seen(pilot, "starting vision", "0:21 of about 0:52", "compiling  torch.compile", "40 %")


async def test_a_refusal_is_told_and_stays_with_its_cure_until_the_next_operation(tmp_path: Path) -> None:
    fleet = ScriptedFleet()

    def refuse() -> object:
        raise RefusedError("phi needs 66.6 GiB and 3 GiB are free. [/b]", "Put qwen to sleep first (s).")

    fleet.outcome = refuse
    fleet.gate.set()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "w")
        await until_seen(
            pilot, "waking phi did not work", "3 GiB are free. [/b]", "Put qwen to sleep first (s)."
        )
        await until_seen(pilot, "Waking phi did not work", "Why stands below the table.")
        assert text_of(pilot.app).count("3 GiB are free.") == 1  # said once, where it stays
        pilot.app.clear_notifications()
        await until(pilot, lambda: "Waking phi" not in text_of(pilot.app), "the end of the toast")
        assert "waking phi did not work" in text_of(pilot.app)
        assert "!" in line_with(lines_of(pilot.app), "phi", "asleep L1")
        fleet.outcome = lambda: None
        await pilot.press("w")
        await until(pilot, lambda: "did not work" not in text_of(pilot.app), "the end of the trouble")


async def test_a_failed_model_shows_reason_and_cure_in_full(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    reason = "The KV cache needs 13.91 GiB and 9.95 GiB are there, " * 3 + "says the engine."
    fleet.change("phi", state=State.FAILED, reason=reason, cure="Set max-model-len to 29286.")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(
            pilot, "why phi failed", "says the engine.", "Set max-model-len to 29286.", "✗ failed"
        )


async def test_an_error_nobody_foresaw_is_told_and_the_panel_lives(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.outcome = lambda: 1 // 0
    fleet.gate.set()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "w")
        await until_seen(pilot, "ZeroDivisionError")
        await pilot.press("up")
        await until_seen(pilot, "last switch to qwen")


async def test_escape_stops_an_operation_at_its_next_safe_point(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "enter")
        await until(pilot, lambda: fleet.calls, "the switch")
        await pilot.press("escape")
        await until(pilot, lambda: fleet.cancelled == ["switch"], "the end of the switch")
        await until_seen(pilot, "Stopped switching to phi.")
        assert "did not work" not in text_of(pilot.app)


async def test_a_second_operation_on_a_busy_model_is_refused_and_a_stop_takes_its_place(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "enter")
        await until(pilot, lambda: fleet.calls, "the switch")
        await pilot.press("s")
        await until_seen(pilot, "Already switching to phi")
        assert fleet.calls == [("switch", "phi")]
        await pilot.press("x")
        await until_seen(pilot, "Stop phi?")
        await pilot.press("y")
        await until(pilot, lambda: fleet.calls[-1] == ("stop", "phi"), "the stop")
        assert fleet.cancelled == ["switch"]
        fleet.gate.set()


async def test_without_nvml_the_reason_stands_in_the_box_and_no_zero_does(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.now = msgspec.structs.replace(
        fleet.now,
        gpus=(),
        host=HostSnapshot(ram_available_bytes=None, ram_total_bytes=None),
        notes=("No NVML: the driver's library was not found, so GPU memory is unknown.",),
    )
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "No NVML: the driver's library was not found", "no GPU")
        assert "0.0" not in text_of(pilot.app)
        assert "SIMULATED" not in text_of(pilot.app)


async def test_the_bar_fits_even_when_more_is_used_than_there_is(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.change("phi", vram_by_gpu={"0": gib(70)}, vram_bytes=gib(70))
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "qwen 69.2", "phi 70.0")
        assert all(len(line) <= 120 for line in lines_of(pilot.app))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (99, 29), (120, 40), (200, 60)])
async def test_every_size_shows_all_models_the_bars_and_what_enter_does(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=size) as pilot:
        await pilot.press("down")
        await until_seen(
            pilot, "enter → phi", "GPU 0", "RAM", "? help", "SIMULATED", "● awake", "72.9 / 79.6 GiB"
        )
        lines = lines_of(pilot.app)
        assert len(lines) <= size[1]
        assert all(name in "\n".join(lines) for name in ("qwen", "phi", "coder", "vision"))


async def test_in_60_columns_the_head_counts_who_is_awake_where_names_have_no_room(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.change("phi", state=State.AWAKE)
    fleet.change("coder", last_failure=LastFailure(reason="It died.", at=NOW))
    async with panel(fleet, tmp_path, size=(60, 20)) as pilot:
        await until_seen(pilot, "coder died, restarted   ● 2 models awake")
        fleet.change("vision", state=State.FAILED, reason="It died.", cure="Look.")
        await until_seen(pilot, "✗ vision failed    ✗ coder died, restarted")
        assert "…" not in lines_of(pilot.app)[0]
        await pilot.resize_terminal(120, 40)
        await until_seen(pilot, "● qwen  ● phi awake")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40), (200, 60)])
async def test_between_a_name_and_its_state_are_two_cells(tmp_path: Path, size: tuple[int, int]) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=size) as pilot:
        await until_seen(pilot, "vision  ", "model   ")
        assert "vision ○" not in text_of(pilot.app)


async def test_a_terminal_that_is_too_small_says_what_is_needed_and_recovers(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=(50, 12)) as pilot:
        await until_seen(pilot, "needs 60×20 at least", "50×12")
        await pilot.resize_terminal(80, 24)
        await until_seen(pilot, "last switch to qwen")
        assert "60×20" not in text_of(pilot.app)


async def test_many_models_scroll_with_the_cursor(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    one = fleet.now.model("coder")
    more = tuple(msgspec.structs.replace(one, name=f"extra-{index:02}") for index in range(30))
    fleet.now = msgspec.structs.replace(fleet.now, models=(*fleet.now.models, *more))
    async with panel(fleet, tmp_path, size=(80, 24)) as pilot:
        await pilot.press("end")
        await until_seen(pilot, "▶ ▚ extra-29")
        await pilot.press("home")
        await until_seen(pilot, "▶ ▌ qwen")


async def test_the_log_follows_the_file_without_its_escapes(tmp_path: Path) -> None:
    log = tmp_path / "phi.log"
    log.write_text("INFO first [/b] line\n\x1b[31mred\x1b[0m \x1b]0;title\x07text\n", encoding="utf-8")
    async with panel(ScriptedFleet(logs=tmp_path), tmp_path) as pilot:
        await pilot.press("down", "l")
        await until_seen(pilot, "Log of phi", "INFO first [/b] line", "red text")
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"line {number}\n" for number in range(20_000))
        await until_seen(pilot, "line 19999")
        kept = pilot.app.screen.query_one(WrappedLog)._kept
        assert any("lines are left out here" in line for line in kept)  # a flood must not hold up the panel
        await pilot.press("escape")
        await until_seen(pilot, "enter → phi")


async def test_why_a_server_died_stays_on_the_screen_until_its_log_is_looked_at(tmp_path: Path) -> None:
    died = tmp_path / "phi.log.died"
    died.write_text("ERROR 11-23 [core.py:1] the last word\n")
    (tmp_path / "phi.log").write_text("".join(f"INFO again {number}\n" for number in range(3)))
    fleet = ScriptedFleet(logs=tmp_path)
    failure = LastFailure(reason="The engine process was killed.", at=NOW - 60, log=str(died))
    fleet.change("phi", last_failure=failure)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "phi died at", "and was started again", "The engine process was killed.")
        await pilot.press("l")
        await until_seen(pilot, "the last word", "It died at", "INFO again 2")
        await pilot.press("escape")
        await until_seen(pilot, "enter → phi")
        await until(pilot, lambda: "started again" not in text_of(pilot.app), "it is let go")


async def test_long_lines_of_the_log_are_broken_at_the_edge_anew_for_each_width(tmp_path: Path) -> None:
    words = " ".join(f"word-{number:02}" for number in range(40))
    (tmp_path / "phi.log").write_text(f"(EngineCore pid=7) ERROR 11-23 [core.py:1] {words}\n")
    async with panel(ScriptedFleet(logs=tmp_path), tmp_path, size=(80, 24)) as pilot:
        await pilot.press("down", "l")
        await until_seen(pilot, "ERROR 11-23", "word-39")
        assert text_of(pilot.app).count("word-") == 40
        await pilot.resize_terminal(60, 24)
        await until(pilot, lambda: text_of(pilot.app).count("word-") == 40, "all of it in fewer columns")
        assert all(len(line) <= 60 for line in lines_of(pilot.app))
        await until_seen(pilot, "ERROR 11-23", "word-39")
        await pilot.resize_terminal(200, 60)
        await until_seen(pilot, " ".join(words.split()[:18]))  # 80 columns are no limit
        await pilot.resize_terminal(60, 24)
        with (tmp_path / "phi.log").open("a") as file:
            file.writelines(f"INFO line {number} of the log\n" for number in range(100))
        await until_seen(pilot, "line 99 of")
        for size in (
            (60, 20),
            (100, 30),
            (100, 22),
        ):  # who follows still does in another size, who reads reads on
            await pilot.resize_terminal(*size)
            await until_seen(pilot, "line 99 of")
        await pilot.press("pageup")
        await until(pilot, lambda: "line 99 of" not in text_of(pilot.app), "further up")
        await pilot.resize_terminal(100, 20)
        await pilot.pause()
        assert "line 99 of" not in text_of(pilot.app)


async def test_help_lists_every_key_and_the_palette_knows_the_same_words(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        await pilot.press("question_mark")
        await until_seen(pilot, "Put it to sleep at level 2", "Follow its log", "Choose a theme")
        await until_seen(pilot, "Find models: only those whose name, source, state or GPU holds a text")
        await pilot.press("escape")
        await until(pilot, lambda: "Choose a theme" not in text_of(pilot.app), "the end of the help")
        await find(pilot, "follow")
        await until_seen(pilot, "Follow its log")


async def test_the_palette_switches_to_a_model_by_name(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await find(pilot, "switch to cod")
        await until_seen(pilot, "Switch to coder")
        await until(pilot, lambda: "Switch to phi" not in text_of(pilot.app), "the end of other finds")
        await pilot.press("enter")
        await until(pilot, lambda: fleet.calls == [("switch", "coder")], "the switch")
        fleet.gate.set()


async def test_a_model_that_left_the_config_while_the_palette_was_open_is_told(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        dashboard = pilot.app.screen
        assert isinstance(dashboard, Dashboard)
        await dashboard.act_on("gone", "stop")
        await until_seen(pilot, "gone is no longer in the config.")


async def test_the_palette_knows_every_action_of_every_model_and_copies_what_there_is_of_it(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    fleet.change("vision", state=State.FAILED, reason="No room.", cure="Stop qwen.")
    config = tmp_path / "vllm-sleep-tui.yaml"
    config.write_text("models: {qwen: {model: a/b}}")
    fleet.loaded = load(config)
    async with panel(fleet, tmp_path) as pilot:
        await find(pilot, "wake phi")
        await until_seen(pilot, "Wake phi")
        await until(pilot, lambda: "Wake qwen" not in text_of(pilot.app), "the end of other finds")
        await pilot.press("enter")
        await until(pilot, lambda: fleet.calls == [("wake", "phi")], "the wake")
        fleet.gate.set()
        await find(pilot, "cause of vis")
        await until_seen(pilot, "Copy the cause of vision")
        await until(pilot, lambda: text_of(pilot.app).count("Copy ") == 1, "the end of other finds")
        await pilot.press("enter")
        await until(pilot, lambda: pilot.app.clipboard == "No room. Stop qwen.", "the copy")
        await pilot.press("home", "Y")
        await until_seen(pilot, "Copy of qwen", "http://127.0.0.1:8004/v1")
        await pilot.press("down", "enter")
        await until(pilot, lambda: pilot.app.clipboard == "4004", "the pid")


@pytest.mark.parametrize("size", [(60, 20), (120, 40)])
async def test_a_long_cause_that_y_would_copy_stays_on_the_screen(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    fleet = ScriptedFleet(logs=tmp_path)
    fleet.change("vision", state=State.FAILED, reason="No room. " * 20, cure="Stop qwen.")
    async with panel(fleet, tmp_path, size=size) as pilot:
        await pilot.press("end", "Y")
        await until_seen(pilot, "─ Copy of vision ─", "cause  No room.", "─ ⏎ copies, esc does not ─╯")


async def test_the_head_says_which_gpu_is_full(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    full = msgspec.structs.replace(fleet.now.gpus[0], used_bytes=gib(79.0))
    fleet.now = msgspec.structs.replace(fleet.now, gpus=(full,))
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, " GPU 0 79.0/79.6 ")


async def test_a_long_toast_takes_a_few_lines_of_a_low_terminal(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=(80, 24)) as pilot:
        pilot.app.notify(" ".join(f"word-{number}" for number in range(200)), title="Long")
        await until_seen(pilot, "Long", "word-0", " …")
        assert sum("word-" in line for line in lines_of(pilot.app)) == 4


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_the_last_line_of_a_toast_is_not_behind_the_keys(size: tuple[int, int], tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=size) as pilot:
        for cells in range(46, 62):  # around what one line holds, in whichever width it is measured
            pilot.app.notify("x" * (cells - 8) + " the-end", timeout=60)
            await until_seen(pilot, "the-end")
            pilot.app.clear_notifications()
            await until(pilot, lambda: "the-end" not in text_of(pilot.app), "its end")


async def test_quitting_asks_when_servers_run_and_leaves_them_on_l(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?", "qwen, phi, coder")
        await pilot.press("escape")
        await until(pilot, lambda: "Quit the panel?" not in text_of(pilot.app), "the end of the question")
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?")
        await pilot.press("l")
        await until(pilot, lambda: not pilot.app.is_running or pilot.app._exit, "the end")
    assert fleet.calls == []


async def test_a_question_fits_into_the_smallest_terminal(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=(60, 20)) as pilot:
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?", "l  Leave them running", "s  Stop them", "esc  Cancel")
        await until(pilot, lambda: pilot.app.screen.query_one(".dialog").region.right <= 60, "room for it")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_a_toast_is_seen_once_beside_a_question_and_never_on_its_answers(
    size: tuple[int, int], tmp_path: Path
) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=size) as pilot:
        pilot.app.notify(" ".join(f"word-{number}" for number in range(200)), title="Long", timeout=60)
        await until_seen(pilot, "▌ Long")
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?", "▌ Long")
        toasts, buttons = (pilot.app.screen.query(kind) for kind in ("Toast", "Button"))
        assert not any(toast.region.overlaps(button.region) for toast in toasts for button in buttons)
        await until(pilot, lambda: text_of(pilot.app).count("▌ Long") == 1, "one toast alone")
        await pilot.press("escape")
        await until(pilot, lambda: "Quit the panel?" not in text_of(pilot.app), "the end of the question")
        await until_seen(pilot, "▌ Long")


async def test_quitting_with_s_stops_all_servers_first(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.gate.set()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("q")
        await until_seen(pilot, "Quit the panel?")
        await pilot.press("s")
        await until(pilot, lambda: len(fleet.calls) == 3, "three stops")
        await until(pilot, lambda: pilot.app._exit, "the end")
    assert sorted(fleet.calls) == [("stop", "coder"), ("stop", "phi"), ("stop", "qwen")]


async def test_quitting_with_nothing_running_is_immediate(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    for name in ("qwen", "phi", "coder"):
        fleet.change(name, state=State.STOPPED)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("q")
        await until(pilot, lambda: pilot.app._exit, "the end")


async def test_the_time_line_shows_who_was_awake(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.change("qwen", since=NOW - 300)
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "last 10 minutes")
        lines = lines_of(pilot.app)
        start = next(index for index, line in enumerate(lines) if "last 10 minutes" in line)
        assert "╷" in lines[start + 1]
        cells = lines[start + 2].split("│")[1].strip().split()[1]
        assert 0.45 < cells.count("█") / len(cells) < 0.55
        assert "▁" in lines[start + 3]
        assert not any("vision" in line for line in lines[start:])  # it has not run in this time


async def test_two_keys_pressed_at_once_act_on_the_model_that_the_first_one_chose(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        pilot.app.simulate_key("down")
        pilot.app.simulate_key("enter")
        await until(pilot, lambda: fleet.calls == [("switch", "phi")], "the switch to phi")
        fleet.gate.set()


async def test_enter_on_a_model_that_is_awake_begins_nothing_and_says_so(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("enter")
        await until_seen(pilot, "qwen is awake.")
        assert fleet.calls == []
        assert "switching to" not in text_of(pilot.app)


async def test_an_operation_that_ends_at_once_leaves_nothing_beside_one_that_goes_on(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "enter")
        await until_seen(pilot, "switching to phi")
        fleet.outcome, fleet.is_gated = lambda: None, False
        await pilot.press("up", "enter")
        await until(pilot, lambda: fleet.calls[-1] == ("switch", "qwen"), "the second switch")
        await until(pilot, lambda: "switching to qwen" not in text_of(pilot.app), "its end")
        assert "switching to phi" in text_of(pilot.app)
        fleet.gate.set()


async def test_an_operation_cancelled_before_its_first_step_is_over(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        dashboard = pilot.app.screen
        assert isinstance(dashboard, Dashboard)
        dashboard.begin("phi", "waking {}", lambda report: fleet.wake("phi", report=report))
        assert dashboard.operations.cancel("phi")
        await until_seen(pilot, "Stopped waking phi.")
        assert fleet.calls == []
        await pilot.press("down", "w")
        await until(pilot, lambda: fleet.calls == [("wake", "phi")], "the next one")
        fleet.gate.set()


def many(fleet: ScriptedFleet, count: int) -> None:
    """So many sleepers more, every third on another GPU, the tenth failed."""
    sleeper = fleet.now.models[2]
    more = tuple(
        msgspec.structs.replace(
            sleeper,
            name=f"extra-{index}",
            gpus=(index % 3,),
            state=State.FAILED if index == 10 else State.ASLEEP,
        )
        for index in range(count)
    )
    fleet.now = msgspec.structs.replace(fleet.now, models=(*fleet.now.models, *more))


def rows(lines: list[str]) -> list[str]:
    """The names in the table, from the top."""
    return [told[1] for line in lines if (told := re.search(r"[▌▐▀▄▚▞▛▟] (\S+) +[○◔●◒◐◓◌✗] ", line))]


async def test_of_many_models_a_few_letters_find_the_one(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    many(fleet, 60)
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "▌ extra-0")
        await pilot.press("slash", *"extra-4")
        await until(
            pilot,
            lambda: rows(lines_of(pilot.app)) == ["extra-4", *(f"extra-4{n}" for n in range(10))],
            "rows",
        )
        await until_seen(pilot, "/ extra-4")
        assert fleet.calls == []  # letters are text here
        await pilot.press("down", "down", "enter")
        await until_seen(pilot, "▶ ▞ extra-41", "enter → extra-41")
        await pilot.press("s")
        await until(pilot, lambda: fleet.calls == [("sleep", "extra-41", None)], "the sleep")
        fleet.gate.set()
        await pilot.press("escape", "escape", "home")
        await until_seen(pilot, "▶ ▌ qwen")
        await pilot.press("slash", *"failed")
        await until(pilot, lambda: rows(lines_of(pilot.app)) == ["extra-10"], "the failed one")
        await pilot.press(*" no such")
        await until_seen(pilot, "No model matches /failed no such; esc shows all 64.")
        calls = len(fleet.calls)
        await pilot.press("enter")
        for key in ("s", "x", "w", "enter", "l", "c"):  # without a row: on nobody, and it is told
            pilot.app.clear_notifications()
            await pilot.press(key)
            await until(pilot, lambda: len(pilot.app.screen.query("Toast")) == 1, "a word on it")
        assert pilot.app.focused is not pilot.app.screen.query_one("#question")
        assert len(fleet.calls) == calls
        await pilot.press("slash", *["backspace"] * len("failed no such"), *"gpu 1")
        await until(pilot, lambda: len(rows(lines_of(pilot.app))) > 5, "the models of a GPU")
        await pilot.press("enter", "end")
        last = "extra-58"
        await until_seen(pilot, f"▶ ▟ {last}")
        await pilot.press("slash", *["backspace"] * len("gpu 1"), *"asleep")
        fleet.change(last, state=State.AWAKE)
        await until_seen(pilot, f"▸ ▟ {last}", "● awake")  # it keeps its row while keys act on it
        await pilot.press("escape", "home")
        await until_seen(pilot, "▶ ▌ qwen")


async def test_of_64_models_on_8_gpus_the_rows_are_counted_and_neighbours_on_a_bar_differ(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    many(fleet, 60)
    gpus = tuple(msgspec.structs.replace(fleet.now.gpus[0], index=index) for index in range(8))
    models = tuple(
        msgspec.structs.replace(one, gpus=(at % 8,), vram_by_gpu={str(at % 8): gib(1.4)})
        for at, one in enumerate(fleet.now.models)
    )
    fleet.now = msgspec.structs.replace(fleet.now, models=models, gpus=gpus)
    async with panel(fleet, tmp_path, size=(80, 24)) as pilot:
        await until_seen(pilot, "model  1–11 of 64", "GPU 6", "GPU 7")
        await pilot.press("end")
        await until_seen(pilot, "of 64", "▶ ▟ extra-59")
        view = View(snapshot=fleet.now)
        for gpu in range(8):
            assert len({view.colors[one.name] for one in models if one.gpus == (gpu,)}) == 8
        assert len({(view.colors[one.name], view.shapes[one.name]) for one in models}) == 64


def test_of_twelve_models_the_first_eight_have_a_colour_each_whatever_gpus_they_share() -> None:
    fleet = ScriptedFleet()
    many(fleet, 8)
    gpus = ((0,), (0,), (1,), (0, 1), (2,), (3,), (4,), (5,), (), (0,), (2,), (3,))
    models = tuple(
        msgspec.structs.replace(one, gpus=on) for one, on in zip(fleet.now.models, gpus, strict=True)
    )
    view = View(snapshot=msgspec.structs.replace(fleet.now, models=models))
    names = [one.name for one in models]
    assert [view.colors[name] for name in names[:8]] == [f"m{number}" for number in range(8)]
    assert len({(view.colors[name], view.shapes[name]) for name in names}) == 12
    assert view.colors[names[9]] not in {view.colors[name] for name in (names[0], names[1], names[3])}


async def test_the_table_sorts_by_what_is_asked(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    many(fleet, 12)
    async with panel(fleet, tmp_path, size=(120, 60)) as pilot:
        await until_seen(pilot, "▌ extra-0")
        in_file = rows(lines_of(pilot.app))
        await pilot.press("f")
        await until_seen(pilot, "model  by state")
        assert rows(lines_of(pilot.app))[:2] == ["extra-10", "qwen"]
        await pilot.press("f")
        await until_seen(pilot, "model  by GPU")
        assert rows(lines_of(pilot.app))[-1] == "extra-11"
        await until_seen(pilot, "─ GPU 1  4 models, 0 awake ─")
        # The row under a group's title is chosen by its place on the screen, titles counted.
        lines = lines_of(pilot.app)
        at = next(number for number, line in enumerate(lines) if "─ GPU 1 " in line)
        await pilot.click(offset=(10, at + 1))
        await until_seen(pilot, "Chat with extra-1")
        await pilot.press("f", "f", "f")
        await until(pilot, lambda: "model  by" not in text_of(pilot.app), "the order of the config")
        assert rows(lines_of(pilot.app)) == in_file


async def test_what_is_wrong_is_said_in_the_head_until_it_is_over(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    host = fleet.now.host
    async with panel(fleet, tmp_path, size=(80, 24)) as pilot:
        assert "✗" not in lines_of(pilot.app)[0]
        fleet.change("coder", state=State.FAILED, reason="killed")
        await until(pilot, lambda: "✗ coder failed" in lines_of(pilot.app)[0], "the failure in the head")
        fleet.change("phi", state=State.FAILED)
        full = msgspec.structs.replace(host, ram_available_bytes=gib(1))
        fleet.now = msgspec.structs.replace(fleet.now, host=full)
        await until(pilot, lambda: "✗ 2 failed    RAM 124/125" in lines_of(pilot.app)[0], "both and the RAM")
        await pilot.press("c")  # wherever one is
        await until(pilot, lambda: "✗ 2 failed" in lines_of(pilot.app)[0], "the failures beside the chat")
        fleet.now = msgspec.structs.replace(four_models(), host=host)
        await until(pilot, lambda: "✗" not in lines_of(pilot.app)[0], "a head without trouble")
