"""How a conversation's model is asked, what it calls, and how likely its words were, in the panel."""

from __future__ import annotations

import json
from pathlib import Path

from screen_text import panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet, write_config
from test_tui_chat import answer, ask
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.snapshot import Alternative, CallDelta, ChatEvent, TokenChance

WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}


def with_presets(folder: Path) -> ScriptedFleet:
    path = write_config(folder)
    path.write_text(path.read_text() + "presets: {exact: {temperature: 0, seed: 7}}\n")
    fleet = ScriptedFleet()
    fleet.loaded = load(path)
    return fleet


async def write(pilot: Pilot[None], **values: str) -> None:
    """Open the form, and write into its lines."""
    await pilot.press("escape", "p")
    await until_seen(pilot, "How qwen is asked")
    for name, value in values.items():
        pilot.app.screen.query_one(f"#{name}", TextArea if name == "system" else Input).focus()
        await pilot.press("end", "ctrl+u", *value)


async def test_what_is_set_is_sent_shown_and_kept_and_a_new_conversation_begins_with_it(
    tmp_path: Path,
) -> None:
    fleet = with_presets(tmp_path)
    fleet.answers["qwen"] = answer("qwen", "Bref.", ttft=0.026)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    async with panel(fleet, tmp_path) as pilot:
        await write(pilot, system="Be brief.", temperature="0.5", stop="END", max_tokens="50")
        pilot.app.screen.query_one("#schema", Input).value = str(schema)
        await pilot.press("enter")
        await until_seen(pilot, "Chat with qwen · system prompt · temp")
        await ask(pilot, "one")
        await until_seen(pilot, "Bref.", "TTFT 26 ms · system prompt · temperature", "'END' · JSON")
        assert fleet.asked[0][1][0] == {"role": "system", "content": "Be brief."}
        sent = {
            "temperature": 0.5,
            "max_tokens": 50,
            "stop": ("END",),
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}},
            },
        }
        assert fleet.asked_with == [sent]
    async with panel(fleet, tmp_path) as pilot:  # as after the panel was killed
        await until_seen(pilot, "TTFT 26 ms · system prompt · temperature")
        await pilot.press("ctrl+n")
        await until_seen(pilot, "Nothing said yet", "Chat with qwen · system prompt")
        await ask(pilot, "two")
        await until(pilot, lambda: len(fleet.asked_with) == 2, "the second question")
        assert fleet.asked_with[1] == sent
        await until_seen(pilot, "Bref.")
        await pilot.press("escape", "p")
        await until_seen(pilot, "How qwen is asked")
        await pilot.press("ctrl+r", "enter")
        await until(pilot, lambda: "Chat with qwen · " not in text_of(pilot.app), "an end of the parameters")
        await pilot.press("ctrl+r")
        await until(pilot, lambda: len(fleet.asked_with) == 3, "the question again")
        assert fleet.asked_with[2] == {}
        assert fleet.asked[2][1] == [{"role": "user", "content": "two"}]


async def test_the_form_begins_in_its_first_field_and_escape_loses_nothing_unasked(tmp_path: Path) -> None:
    fleet = with_presets(tmp_path)
    fleet.answers["qwen"] = answer("qwen", "done")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("p")
        await until_seen(pilot, "How qwen is asked")
        await pilot.press("escape")  # nothing was written
        await until(pilot, lambda: "How qwen is asked" not in text_of(pilot.app), "an end of the form")
        await pilot.press("p")
        await until_seen(pilot, "How qwen is asked")
        await pilot.press(*"brief", "ctrl+j", *"kind", "up", "down", "down", "1")
        await pilot.press("escape")
        await until_seen(pilot, "Drop what was written here?")
        await pilot.press("escape")
        await until_seen(pilot, "How qwen is asked", "brief", "kind")
        await pilot.press("up", "enter")
        await until_seen(pilot, "Chat with qwen · system prompt · temp")
        await pilot.press("p")
        await until_seen(pilot, "How qwen is asked")
        await pilot.press(*"un", "escape")
        await until_seen(pilot, "Drop what was written here?")
        await pilot.press("y")
        await until(pilot, lambda: "How qwen is asked" not in text_of(pilot.app), "an end of the form")
        await ask(pilot, "one")
        await until_seen(pilot, "done")
        assert fleet.asked[0][1][0] == {"role": "system", "content": "brief\nkind"}


async def test_a_wrong_value_is_told_with_its_cure_and_the_form_stays(tmp_path: Path) -> None:
    async with panel(with_presets(tmp_path), tmp_path, size=(80, 24)) as pilot:
        await pilot.press("c")
        await write(pilot, top_p="3")
        await pilot.press("enter")
        await until_seen(
            pilot, "top_p must be a number above 0 and up to 1, not 3.", "Correct it, or leave it"
        )
        await write_anew(pilot, "top_p", "")
        await write_anew(pilot, "tools", "/nowhere/tools.json")
        await pilot.press("enter")
        await until_seen(pilot, "tools cannot be read: /nowhere/tools.json: No such file or directory.")
        assert pilot.app.focused is not None
        assert pilot.app.focused.id == "tools"


async def write_anew(pilot: Pilot[None], name: str, value: str) -> None:
    pilot.app.screen.query_one(f"#{name}", Input).value = value
    await pilot.pause()


async def test_presets_come_by_name_from_the_config_and_from_what_was_kept_in_the_panel(
    tmp_path: Path,
) -> None:
    fleet = with_presets(tmp_path)
    fleet.answers["qwen"] = answer("qwen", "done")
    async with panel(fleet, tmp_path) as pilot:
        await write(pilot, temperature="1.5", preset="exact")
        await pilot.press("ctrl+s")
        await until_seen(pilot, "exact is a preset of the config")
        await write_anew(pilot, "preset", "wild")
        await pilot.press("ctrl+s")
        await until_seen(pilot, "Kept as wild.")
        await pilot.press("escape")
    async with panel(fleet, tmp_path) as pilot:
        await write(pilot)
        await pilot.press("ctrl+o")
        await until_seen(pilot, "wild  temperature 1.5", "exact  temperature 0 · seed 7")
        await pilot.press("enter")
        await until(
            pilot, lambda: pilot.app.screen.query_one("#preset", Input).value == "wild", "what it fills in"
        )
        await pilot.press("ctrl+g")
        await until_seen(pilot, "Delete the preset wild?")
        await pilot.press("y")
        await until_seen(pilot, "The preset wild is deleted.")
        await pilot.press("ctrl+g")
        await until_seen(pilot, "No preset of that name")
        await pilot.press("ctrl+o")
        await until_seen(pilot, "exact  temperature 0 · seed 7")
        assert "wild  temperature" not in text_of(pilot.app)
        await pilot.press("enter")
        await until(
            pilot, lambda: pilot.app.screen.query_one("#preset", Input).value == "exact", "what it fills in"
        )
        await pilot.press("ctrl+g")
        await until_seen(pilot, "exact is a preset of the config.")
        await pilot.press("enter")
        await ask(pilot, "q")
        await until(pilot, lambda: fleet.asked_with, "the question")
        assert fleet.asked_with == [{"temperature": 0, "seed": 7}]


async def test_what_a_model_calls_is_shown_as_it_comes_kept_and_told_truly(tmp_path: Path) -> None:
    fleet = ScriptedFleet()

    def piece(index: int, name: str = "", arguments: str = "") -> ChatEvent:
        delta = CallDelta(index=index, id=f"c{index}" if name else "", name=name, arguments=arguments)
        return ChatEvent(model="qwen", calls=(delta,))

    fleet.answers["qwen"] = [
        piece(0, "get_weather"),
        piece(0, arguments='{"city": "Par'),
        0.0,
        piece(0, arguments='is \x1b[2J<b>"}'),
        piece(1, "get_time"),
        piece(1, arguments='"broken'),
        ChatEvent(model="qwen", finish_reason="tool_calls"),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "weather?")
        await until_seen(pilot, "calls get_weather", '{"city": "Par')
        assert "no JSON" not in text_of(pilot.app)  # it is not over
        fleet.gate.set()
        await until_seen(pilot, '{"city": "Paris <b>"}', "calls get_time · the arguments are no", '"broken')
        fleet.answers["qwen"] = answer("qwen", "I see.")
        await pilot.press(*"so", "enter")
        await until_seen(pilot, "I see.")
        told = fleet.asked[1][1]
        assert [turn["role"] for turn in told] == ["user", "assistant", "tool", "user"]
        assert [call["function"]["name"] for call in told[1]["tool_calls"]] == ["get_weather"]
        assert "not carried out" in told[2]["content"]
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, '{"city": "Paris <b>"}', "calls get_time · the arguments are no", "I see.")
        store = pilot.app.conversations  # type: ignore[attr-defined]
        turns = store.turns(store.latest("qwen").result().id).result()
        assert [(call.name, call.arguments) for call in turns[1].calls] == [
            ("get_weather", '{"city": "Paris <b>"}'),
            ("get_time", '"broken'),
        ]


async def test_i_shows_how_likely_the_words_of_the_answer_under_the_mouse_were(tmp_path: Path) -> None:
    fleet = ScriptedFleet()

    def chance(token: str, logprob: float, other: str) -> ChatEvent:
        alternatives = (Alternative(token, logprob), Alternative(other, -3.0))
        return ChatEvent(model="qwen", text=token, chances=(TokenChance(token, logprob, alternatives),))

    fleet.answers["qwen"] = [
        chance("Paris", -0.105, "Rome"),
        chance("\x1b\n", -0.693, "!"),
        ChatEvent(model="qwen", finish_reason="stop"),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "Paris")
        fleet.answers["qwen"] = answer("qwen", "without")
        await pilot.press(*"q2", "enter")
        await until_seen(pilot, "without")
        await pilot.press("escape", "i")
        await until_seen(pilot, "came without probabilities")
        await pilot.hover("#transcript", offset=(5, 4))
        await pilot.press("i")
        await until_seen(pilot, "How likely qwen found its words", "2 tokens, on average 67 % likely")
        await until_seen(pilot, "Paris", "90 %", "Rome 5 %", "⏎", "50 %")


async def test_a_question_that_is_edited_stands_until_the_new_one_is_sent(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "first answer")
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until_seen(pilot, "first answer")
        await pilot.press(*"begun")
        await pilot.press("ctrl+l", "escape")
        await until_seen(pilot, "q1", "first answer", "What was not asked is kept")
        field = pilot.app.screen.query_one("#question", TextArea)
        await until(pilot, lambda: field.text == "q1", "the question in the input")
        await pilot.press("c", "up")
        await until(pilot, lambda: field.text == "begun", "what was typed, of which nothing is lost")
        await pilot.press("down", "x", "enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "the edited question")
        assert fleet.asked[1][1] == [{"role": "user", "content": "q1x"}]
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "the answer")  # type: ignore[attr-defined]
        await pilot.press("ctrl+l", "ctrl+u")
        await pilot.press(*"anew", "enter")  # the input was empty: a question of its own
        await until(pilot, lambda: len(fleet.asked) == 3, "another question")
        assert [turn["content"] for turn in fleet.asked[2][1]] == ["q1x", "first answer", "anew"]


async def test_a_refused_question_is_kept_where_another_is_begun(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [
        ChatEvent(model="qwen", text="a"),
        0.0,
        ChatEvent(model="qwen", finish_reason="stop"),
    ]
    async with panel(fleet, tmp_path) as pilot:
        await ask(pilot, "q1")
        await until(pilot, lambda: pilot.app.dashboard.is_answering, "the answer")  # type: ignore[attr-defined]
        field = pilot.app.screen.query_one("#question", TextArea)
        await pilot.press(*"refused", "enter")
        await until(pilot, lambda: field.text == "refused", "the question back in the input")
        await pilot.press(*"next")
        await until(pilot, lambda: field.text == "next", "another one")
        await pilot.press("up")
        await until(pilot, lambda: field.text == "refused", "the one before")
        fleet.gate.set()
        await until(pilot, lambda: not pilot.app.dashboard.is_answering, "the end")  # type: ignore[attr-defined]
        await pilot.press("enter")
        await until(pilot, lambda: len(fleet.asked) == 2, "it is asked")
        assert fleet.asked[1][1][-1]["content"] == "refused"


def test_tools_of_a_file_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    path = tmp_path / "c.yaml"
    path.write_text("models: {a: {model: x/y}}\npresets: {t: {tools: tools.json, schema: {}}}\n")
    preset = load(path).config.presets["t"]
    assert preset.body() == {"tools": (WEATHER,), "response_format": {"type": "json_object"}}
