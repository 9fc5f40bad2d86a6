"""The chat pane over a scripted fleet."""

from __future__ import annotations

from pathlib import Path

from screen_text import panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from textual.events import Paste
from textual.pilot import Pilot

from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.snapshot import ChatEvent, Progress


async def ask(pilot: Pilot[None], text: str) -> None:
    await pilot.press("c", *text, "enter")


def answer(model: str, *texts: str, **first: float) -> list[ChatEvent | float]:
    pieces: list[ChatEvent | float] = [ChatEvent(model=model, text=text) for text in texts]
    return [ChatEvent(model=model, **first), *pieces, ChatEvent(model=model, finish_reason="stop")]


async def test_an_answer_says_who_answers_how_it_woke_and_how_fast_it_was(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["phi"] = answer("phi", "Because **air** scatters.", switch_seconds=0.36, ttft=0.026)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "Chat with phi")
        await ask(pilot, "why?")
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
        await until_seen(pilot, "qwen: sleep level 1  50 %")
        fleet.gate.set()
        await until(pilot, lambda: "qwen: sleep" not in text_of(pilot.app), "the end of the switch")


async def test_each_model_has_its_own_conversation_of_many_turns(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers = {"qwen": answer("qwen", "I am qwen."), "phi": answer("phi", "I am phi.")}
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "one")
        await until_seen(pilot, "I am qwen.")
        await pilot.press(*"two", "ctrl+j")
        await until(pilot, lambda: text_of(pilot.app).count("I am qwen.") == 2, "the second answer")
        assert [turn["content"] for turn in fleet.asked[1][1]] == ["one", "I am qwen.", "two"]
        await pilot.press("escape", "down")
        await until_seen(pilot, "Chat with phi")
        assert "I am qwen." not in text_of(pilot.app)
        await ask(pilot, "x")
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
        await until_seen(pilot, "swuxrcltq12y?", "letters are text here")
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
        assert "enter → qwen" not in text_of(pilot.app)
        await pilot.press("escape", "escape")
        await until_seen(pilot, "enter → qwen")


async def test_a_very_long_answer_is_shown_to_its_end(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    paragraphs = [f"Paragraph {number} says a few words.\n\n" for number in range(300)]
    fleet.answers["qwen"] = answer("qwen", *paragraphs)
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "long")
        await until_seen(pilot, "Paragraph 299 says a few words.")
