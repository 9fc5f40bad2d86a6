"""The chat pane over a scripted fleet."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from screen_text import panel, text_of, until, until_seen
from scripted_fleet import TIMES, ScriptedFleet
from textual.events import Paste
from textual.pilot import Pilot

from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.snapshot import ChatEvent, Progress
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.widgets.chat_input import ChatInput


async def ask(pilot: Pilot[None], text: str) -> None:
    await pilot.press("c", *text, "enter")


def answer(model: str, *texts: str, **first: float) -> list[ChatEvent | float]:
    pieces: list[ChatEvent | float] = [ChatEvent(model=model, text=text) for text in texts]
    return [ChatEvent(model=model, **first), *pieces, ChatEvent(model=model, finish_reason="stop")]


async def test_a_phase_and_its_time_stay_together_in_every_width(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", switch_seconds=0.46, switch_times=TIMES),
        ChatEvent(model="qwen", text="Yes."),
        ChatEvent(model="qwen", finish_reason="stop"),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c", *"ok?", "enter")
        await until_seen(pilot, "Yes.")
        for width in range(100, 130):
            await pilot.resize_terminal(width, 40)
            await until(
                pilot, lambda: text_of(pilot.app).count("wake 0.36 s") == 2, "here and under the table"
            )


async def test_an_answer_says_who_answers_how_it_woke_and_how_fast_it_was(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["phi"] = answer("phi", "Because **air** scatters.", switch_seconds=0.36, ttft=0.026)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "Chat with phi")
        await ask(pilot, "why?")
        await until_seen(pilot, "Switch to phi?", "leeps qwen")
        assert fleet.asked == []
        await pilot.press("y")
        await until_seen(pilot, "you", "why?", "Because air scatters.", "woke in 0.36 s · TTFT 26 ms")
        assert fleet.asked == [("phi", [{"role": "user", "content": "why?"}])]


async def test_the_steps_of_a_switch_show_in_the_answer_while_it_waits(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.steps = [Progress(model="qwen", operation="switch", phase="sleep", detail="level 1", fraction=0.5)]
    fleet.answers["phi"] = [0.0, *answer("phi", "done")]
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "Chat with phi")
        await ask(pilot, "a")
        await until_seen(pilot, "Switch to phi?")
        await pilot.press("y")
        await until_seen(pilot, "qwen: sleep level 1  50 %")
        fleet.gate.set()
        await until(pilot, lambda: "qwen: sleep" not in text_of(pilot.app), "the end of the switch")


@pytest.mark.parametrize("comes_up", [True, False], ids=["it comes up", "it fails"])
async def test_a_model_that_is_being_started_is_asked_once_it_is_awake_and_never_started_again(
    tmp_path: Path, comes_up: bool
) -> None:
    fleet = ScriptedFleet()
    fleet.answers["vision"] = answer("vision", "A cat.")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "down", "down", "u")
        await until(pilot, lambda: fleet.calls == [("start", "vision")], "the start")
        await ask(pilot, "what?")
        await until_seen(pilot, "starting vision; asked once it is awake")
        assert fleet.asked == []
        if comes_up:
            fleet.change("vision", state=State.AWAKE)
            fleet.gate.set()
            await until_seen(pilot, "A cat.")
            assert "asked once" not in text_of(pilot.app)
        else:
            fleet.change("vision", state=State.FAILED)
            fleet.gate.set()
            await until_seen(pilot, "vision was not asked: starting vision")
            await until(pilot, lambda: pilot.app.screen.query_one(ChatInput).text == "what?", "its return")
            assert fleet.asked == []
        assert fleet.calls == [("start", "vision")]


async def test_each_model_has_its_own_conversation_of_many_turns(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers = {"qwen": answer("qwen", "I am qwen."), "phi": answer("phi", "I am phi.")}
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "one")
        await until_seen(pilot, "I am qwen.")
        await pilot.press(*"two", "enter")
        await until(pilot, lambda: text_of(pilot.app).count("I am qwen.") == 2, "the second answer")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["one", "I am qwen.", "two"]
        await pilot.press("escape", "down")
        await until_seen(pilot, "Chat with phi")
        assert "I am qwen." not in text_of(pilot.app)
        await ask(pilot, "x")
        await until_seen(pilot, "Switch to phi?")
        await pilot.press("y")
        await until_seen(pilot, "I am phi.")
        assert [turn["content"] for turn in fleet.asked[2][1]] == ["x"]


async def test_escape_leaves_the_input_then_stops_the_answer_and_keeps_what_was_said(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", text="Half an ans"),
        0.0,
        ChatEvent(model="qwen", text="wer"),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "Half an ans")
        await pilot.press("escape")
        await pilot.pause()
        assert "stopped" not in text_of(pilot.app).replace("○ stopped", "")
        await pilot.press("escape")
        await until_seen(pilot, "Half an ans", "what was said is kept")
        fleet.answers["qwen"] = answer("qwen", "again")
        await ask(pilot, "q2")
        await until_seen(pilot, "again")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["q", "Half an ans", "q2"]


async def test_letters_are_text_while_the_input_has_the_focus(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c", *"swuxrcltq12y?")
        await until_seen(pilot, "swuxrcltq12y?", "letters are text")
        assert fleet.calls == []
        assert "Quit" not in text_of(pilot.app)
        await pilot.press("escape", "s")
        await until(pilot, lambda: fleet.calls == [("sleep", "qwen", None)], "the sleep")
        fleet.gate.set()


async def test_a_failed_answer_says_why_and_the_question_is_not_sent_again(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [OperationError("The engine died [/x].", "Restart it (r).")]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "lost")
        await until_seen(pilot, "The engine died [/x].", "Restart it (r).")
        fleet.answers["qwen"] = answer("qwen", "fine")
        await pilot.press(*"next", "enter")
        await until_seen(pilot, "fine")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["next"]


async def test_what_a_model_writes_is_never_markup_and_moves_no_cursor(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer(
        "qwen", "[/b] [red]x \x1b[2J\x1b]0;title\x07end\u202e [click](http://a.example)"
    )
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "[/q]")
        await until_seen(pilot, "[/q]", "[/b] [red]x end", "http://a.example")
        assert "title" not in text_of(pilot.app)


async def test_reasoning_shows_apart_from_the_answer_and_is_not_sent_back(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [ChatEvent(model="qwen", reasoning="Let me think."), *answer("qwen", "Four.")]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "2+2")
        await until_seen(pilot, "thought for", "3 words", "Four.")
        assert "Let me think." not in text_of(pilot.app)
        await pilot.press("escape", "o")
        await until_seen(pilot, "Let me think.", "Four.")
        await pilot.press("o")
        await until(pilot, lambda: "Let me think." not in text_of(pilot.app), "the fold")
        await pilot.press("c")
        await pilot.press(*"so", "enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "the second question")
        assert fleet.asked[1][1][1] == {"role": "assistant", "content": "Four."}


async def test_y_copies_the_last_answer_as_it_was_written(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "# Title\n\n", "*text*")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("y")
        await until_seen(pilot, "has not answered anything yet")
        await ask(pilot, "q")
        await until_seen(pilot, "Title", "text")
        await pilot.press("escape", "y")
        await until_seen(pilot, "Sent the answer to the terminal", "15 characters")
        assert pilot.app.clipboard == "# Title\n\n*text*"


async def test_a_pasted_text_keeps_its_lines(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "ok")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c")
        pilot.app.post_message(Paste("def f():\n    return 1"))
        await until_seen(pilot, "return 1")
        await pilot.press("enter")
        await until(pilot, lambda: fleet.asked, "the question")
        assert fleet.asked[0][1][0]["content"] == "def f():\n    return 1"


async def test_on_a_narrow_screen_the_chat_takes_the_place_of_the_models_and_gives_it_back(
    tmp_path: Path,
) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=(80, 24)) as pilot:
        assert "Chat with" not in text_of(pilot.app)
        await pilot.press("c", "h")
        await until_seen(pilot, "Chat with qwen")
        assert "last switch to qwen" not in text_of(pilot.app)
        await pilot.press("escape", "escape")
        await until_seen(pilot, "last switch to qwen")


async def test_a_very_long_answer_is_shown_to_its_end(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    paragraphs = [f"Paragraph {number} says a few words.\n\n" for number in range(300)]
    fleet.answers["qwen"] = answer("qwen", *paragraphs)
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "long")
        await until_seen(pilot, "Paragraph 299 says a few words.")


async def test_the_mouse_selects_text_and_it_is_copied_with_the_lines_it_was_written_in(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    words = "One line that is long enough to be broken in the pane of the chat, surely."
    fleet.answers["qwen"] = answer("qwen", f"{words}\n\n```py\nif a<b:\n    f()\n```\n")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "surely.", "f()")
        await pilot.press("escape")
        await pilot.mouse_down("#transcript", offset=(2, 4))
        await pilot.hover("#transcript", offset=(30, 10))
        await pilot.mouse_up("#transcript", offset=(30, 10))
        await pilot.press("y")
        await until_seen(pilot, "Sent the selection to the terminal")
        assert pilot.app.clipboard == f"{words}\n\npy\nif a<b:\n    f()"


async def test_v_copies_the_code_in_sight_and_what_is_copied_is_clean(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer(
        "qwen", "```\none\n```\nand\n```sh\n\x1b[31mrm x\x1b]0;", "t\x07\n```\nend"
    )
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("v")
        await until_seen(pilot, "There is no block of code in sight.")
        await ask(pilot, "q")
        await until_seen(pilot, "rm x", "end")
        await pilot.press("escape", "v")
        await until_seen(pilot, "Sent the code to the terminal: 4 characters.")
        assert pilot.app.clipboard == "rm x"
        await pilot.hover("#transcript", offset=(5, 4))
        await pilot.press("v")
        await until(pilot, lambda: pilot.app.clipboard == "one", "the other block")


async def test_in_tmux_a_copy_is_told_to_have_arrived_once_tmux_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    tmux = programs / "tmux"
    tmux.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat > {tmp_path}/buffer\n')
    tmux.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "<b>ü")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "<b>ü")
        await pilot.press("escape", "y")
        await until_seen(pilot, "Copied the answer: 4 characters, in tmux's buffer.")
        assert (tmp_path / "buffer").read_text() == "<b>ü"
        assert (tmp_path / "asked").read_text() == "load-buffer -w -\n"
        tmux.write_text("#!/bin/sh\nexit 1\n")  # as one before 3.2, which does not know -w
        await pilot.press("y")
        await until_seen(pilot, "Sent the answer to the terminal: 4 characters.")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("length", "cut off: the token limit"),
        ("abort", "cut off: the model was put to sleep"),
        ("content_filter", "cut off by a content filter"),
        ("weird\x1b[2J", "cut off: weird"),
    ],
)
async def test_an_answer_that_was_cut_is_told_as_cut(tmp_path: Path, reason: str, words: str) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", text="half"),
        ChatEvent(model="qwen", finish_reason=reason),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "half", words)


async def test_an_answer_that_broke_off_is_told_as_not_whole_and_kept(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", text="half an ans"),
        ChatEvent(model="qwen", error="The engine died."),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "half an ans", "The answer is not whole. The engine died.")
        fleet.answers["qwen"] = answer("qwen", "more")
        await pilot.press(*"go", "enter")
        await until_seen(pilot, "more")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["q", "half an ans", "go"]


async def test_reading_back_stays_where_it_is_while_more_comes_and_the_end_is_followed_again(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    first = [f"line {number}\n\n" for number in range(100)]
    fleet.answers["qwen"] = [
        *(ChatEvent(model="qwen", text=text) for text in first),
        0.0,
        *(ChatEvent(model="qwen", text=f"later {number}\n\n") for number in range(100)),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q")
        await until_seen(pilot, "line 99")
        await pilot.press("escape", "tab", "tab")
        await until(
            pilot, lambda: pilot.app.focused is not None and pilot.app.focused.id == "transcript", "focus"
        )
        await pilot.press("home")
        await until_seen(pilot, "line 0")
        fleet.gate.set()
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "the end")  # type: ignore[attr-defined]
        await until_seen(pilot, "line 0")
        await pilot.resize_terminal(100, 40)
        await until_seen(pilot, "line 0")
        await pilot.press("end")
        await until_seen(pilot, "later 99")
        await pilot.resize_terminal(140, 40)
        await until_seen(pilot, "later 99")
