"""Two answers to one question side by side, or one above the other where the terminal is narrow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.events import Resize
from textual.widgets import Static

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.differing import Differing, difference
from vllm_sleep_tui.tui.drawing.flow import Row
from vllm_sleep_tui.tui.drawing.turns import Answer, Turn
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.talk import Entry
from vllm_sleep_tui.tui.theme import palette_of
from vllm_sleep_tui.tui.widgets.bands import FollowingBand, KeyLine
from vllm_sleep_tui.tui.widgets.transcript import Transcript

STEP_SECONDS = 0.1
NARROW_WIDTH = 100
QUESTION_LENGTH = 400
"""Characters of the question that are shown."""
_KEYS = "esc back  w words that differ  tab the other  ↑ ↓ scroll  o reasoning  y copy"


class _Headless(Answer):
    """An answer whose model is named by its frame, which is seen wherever the rows are."""

    def _head(self) -> list[Row]:
        return []


class Side:
    """One answer as this screen shows it: rows of its own, since the pane has others of another width."""

    def __init__(self, entry: Entry) -> None:
        answer = entry.turn
        assert isinstance(answer, Answer)
        self.entry, self.answer = entry, answer
        self.shown = _Headless(answer.model, answer.paint)
        self._taken = (0, 0)

    def follow(self) -> bool:
        """Take what has come since the last look; False if nothing changed."""
        if self.shown.is_over:
            return False
        text, reasoning = self.answer.text, self.answer.reasoning
        self.shown.add(text[self._taken[0] :], reasoning[self._taken[1] :])
        self._taken = (len(text), len(reasoning))
        self.shown.share_calls(self.answer)
        self.shown.flush()
        self.shown.say_above(*self.answer.above)
        if self.answer.is_over:
            self.shown.end()
            self.shown.thought_seconds = self.answer.thought_seconds
        self.shown.say(
            *(self.entry.note() if self.answer.is_over else [((self.entry.pace.words(), "muted"),)])
        )
        return True

    def words(self) -> str:
        """How long it is, in tokens; how fast it was stands below it."""
        tokens = self.entry.pace.tokens
        return f"{tokens} tokens" if tokens else ""


class DuelScreen(LookingScreen):
    """The whole screen for two answers."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,d,D,q", "close", "back", show=False),
        Binding("w", "differ", "differ", show=False),
        Binding("o", "fold", "reasoning", show=False),
        Binding("y", "copy", "copy", show=False),
    ]

    def __init__(self, question: str, pair: tuple[Entry, Entry], look: Callable[[], FleetSnapshot]) -> None:
        super().__init__()
        self._fleet_now = look
        self._question = question
        self._sides = [Side(entry) for entry in pair]
        self._differs = False

    def compose(self) -> ComposeResult:
        """The question, two answers, the keys."""
        short = clean(self._question)
        short = short if len(short) <= QUESTION_LENGTH else short[:QUESTION_LENGTH] + "…"
        yield FollowingBand(self._fleet_now, id="top")
        yield Static(Text.assemble(("you  ", "bold"), short), id="duel-question", markup=False)
        with Container(id="sides"):
            for number in range(len(self._sides)):
                yield Transcript(id=f"side-{number}")
        yield KeyLine(_KEYS, id="keys")

    def on_mount(self) -> None:
        """Show what has come so far, and follow what comes."""
        for number, side in enumerate(self._sides):
            transcript = self._transcript(number)
            transcript.show([side.shown], ())
        self._title()
        self._transcript(0).focus()
        self.look_every(STEP_SECONDS, self._look)
        self.call_after_refresh(self._look)

    def _title(self) -> None:
        for number, side in enumerate(self._sides):
            color = palette_of(self).style(side.answer.paint).color
            style = f"bold {color.name}" if color is not None else "bold"
            self._transcript(number).border_title = Text(side.answer.model, style=style).markup

    def on_resize(self, event: Resize) -> None:
        """Side by side where there is room for two."""
        self.set_class(event.size.width < NARROW_WIDTH, "-narrow")

    def _transcript(self, number: int) -> Transcript:
        return self.query_one(f"#side-{number}", Transcript)

    def _look(self) -> None:
        for number, side in enumerate(self._sides):
            if side.follow():
                transcript = self._transcript(number)
                transcript.border_subtitle = Text(side.words()).markup
                if not self._differs:
                    transcript.grew(side.shown)
        if self.look_timer is not None and all(side.shown.is_over for side in self._sides):
            self.look_timer.stop()

    @property
    def _focused(self) -> Side:
        return self._sides[1 if self._transcript(1).has_focus else 0]

    @work(exclusive=True, group="differ")
    async def action_differ(self) -> None:
        """Mark the words that only one of them has, or show the answers again."""
        if not all(side.shown.is_over for side in self._sides):
            self.notify("Both have to come to their end first.", markup=False)
            return
        turns: list[list[Turn]] = [[side.shown] for side in self._sides]
        words = [side.words() for side in self._sides]
        if not self._differs:
            texts = [side.answer.text for side in self._sides]
            found = await asyncio.to_thread(difference, texts[0], texts[1])
            turns = [
                [Differing(side.answer.model, side.answer.paint, side.answer.text, same)]
                for side, same in zip(self._sides, found[:2], strict=True)
            ]
            words = [f"{found.share * 100:.0f} % of the words are the same"] * 2
        self._differs = not self._differs
        for number in range(2):
            self._transcript(number).show(turns[number], (), at=0)
            self._transcript(number).border_subtitle = Text(words[number]).markup

    def action_fold(self) -> None:
        """Show the reasoning of the answer in focus, or hide it."""
        side = self._focused
        if side.shown.reasoning and not self._differs:
            side.shown.fold()
            self._transcript(self._sides.index(side)).grew(side.shown)

    def on_transcript_folded(self, message: Transcript.Folded) -> None:
        """The same by a click."""
        message.stop()
        for number, side in enumerate(self._sides):
            if side.shown is message.answer:
                side.shown.fold()
                self._transcript(number).grew(side.shown)

    def action_copy(self) -> None:
        """The answer in focus to the clipboard."""
        app: Any = self.app
        app.copy_to_clipboard(self._focused.answer.text, "the answer")

    def recolor(self) -> None:
        """Follow a change of theme."""
        super().recolor()
        self._title()
        for number in range(2):
            self._transcript(number).refresh()

    def action_close(self) -> None:
        """Back to the chat; an answer under way goes on."""
        self.dismiss()
