"""The chat pane: ask the selected model; asleep, it is switched to first."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.timer import Timer
from textual.widgets import TextArea

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.snapshot import ChatEvent, Progress, cut_words
from vllm_sleep_tui.tui.drawing.paint import Line
from vllm_sleep_tui.tui.drawing.turns import Answer
from vllm_sleep_tui.tui.state.operations import Operations, expected
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.talk import Talk
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.theme import palette_of
from vllm_sleep_tui.tui.widgets.transcript import Transcript
from vllm_sleep_tui.units import took

FLUSH_SECONDS = 0.1
_HINT: Line = (("Nothing said yet. c goes to the input below.", "muted"),)


class ChatInput(TextArea):
    """Where the question is typed; enter and ctrl+j send it, a pasted text keeps its lines."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+j", "send", "send", show=False)]

    class Sent(Message):
        """The person sent a question."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.prevent_default()
            event.stop()
            self.action_send()
        else:
            await super()._on_key(event)

    def action_send(self) -> None:
        """Send what is typed, if anything is."""
        if self.text.strip():
            self.post_message(self.Sent(self.text.strip()))
            self.clear()


@dataclass(slots=True)
class Pace:
    """When an answer's pieces came."""

    switch_seconds: float | None = None
    ttft: float | None = None
    first: float | None = None
    last: float | None = None
    tokens: int | None = None
    finish_reason: str | None = None

    def see(self, event: ChatEvent) -> None:
        """Take the figures of one event."""
        now = time.monotonic()
        if event.text or event.reasoning:
            self.first = self.first or now
            self.last = now
        self.switch_seconds = self.switch_seconds if event.switch_seconds is None else event.switch_seconds
        self.ttft = self.ttft if event.ttft is None else event.ttft
        self.tokens = self.tokens if event.completion_tokens is None else event.completion_tokens
        self.finish_reason = event.finish_reason or self.finish_reason

    def words(self, *, was_started: bool) -> str:
        """`woke in 0.36 s · TTFT 26 ms · 212 tok/s`, as far as it is known."""
        parts = []
        if self.switch_seconds is not None:
            parts.append(f"{'started' if was_started else 'woke'} in {took(self.switch_seconds)}")
        if self.ttft is not None:
            parts.append(f"TTFT {took(self.ttft)}")
        if self.tokens and self.tokens > 1 and self.first and self.last and self.last > self.first:
            parts.append(f"{(self.tokens - 1) / (self.last - self.first):.0f} tok/s")
        return " · ".join(parts)


class ChatPane(Vertical):
    """A conversation for each model, and one input for the selected one."""

    def __init__(self, fleet: PanelFleet, operations: Operations, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._fleet = fleet
        self._operations = operations
        self._talks: dict[str, Talk] = {}
        self._answering: dict[str, asyncio.Task[PanelError | None]] = {}
        self._model: str | None = None
        self._view: View | None = None
        self._flush_timer: Timer | None = None

    def compose(self) -> ComposeResult:
        """What was said, and the input."""
        yield Transcript(id="transcript")
        yield ChatInput(id="question", compact=True, highlight_cursor_line=False)

    def on_mount(self) -> None:
        """The timer that shows what streamed in; it runs only while something streams."""
        self._flush_timer = self.set_interval(FLUSH_SECONDS, self._flush, pause=True)

    @property
    def input(self) -> ChatInput:
        """Where the person types."""
        return self.query_one(ChatInput)

    @property
    def transcript(self) -> Transcript:
        """What was said."""
        return self.query_one(Transcript)

    @property
    def is_answering(self) -> bool:
        """True while any answer is under way."""
        return bool(self._answering)

    def show(self, view: View) -> None:
        """Turn to the selected model."""
        self._view = view
        if view.selected is None or view.selected == self._model:
            return
        if self._model is not None:
            self._talks[self._model].row_at_top = self.transcript.row_at_top
        self._model = name = view.selected
        talk = self._talks.setdefault(name, Talk())
        self.transcript.show(talk.turns, _HINT, at=talk.row_at_top)
        self._title(view)

    def _title(self, view: View) -> None:
        name = self._model or ""
        color = self._paint(view.colors[name])
        self.border_title = Text.assemble("Chat with ", (name, f"bold {color}")).markup
        self.input.placeholder = f"Ask {name} …"

    def recolor(self) -> None:
        """Follow a change of theme."""
        if self._view is not None and self._model is not None:
            self._title(self._view)
        self.transcript.refresh()

    def _paint(self, paint: str) -> str:
        color = palette_of(self).style(paint).color
        return color.name if color is not None else "default"

    def on_chat_input_sent(self, message: ChatInput.Sent) -> None:
        """Ask the selected model."""
        message.stop()
        name, view = self._model, self._view
        if name is None or view is None:
            return
        if name in self._answering:
            self.notify(f"{name} is still answering; escape stops it.", markup=False)
            self.input.text = message.text
            return
        talk = self._talks[name]
        answer = talk.ask(message.text, name, view.colors[name])
        self._shown(talk)
        self.transcript.to_end()
        was_started = view.prediction is not None and view.prediction.action == "start"
        pace = Pace()
        task = self._operations.spawn(self._stream(name, talk, answer, pace))
        self._answering[name] = task
        # The end is a callback for the reason that `Operations` gives.
        task.add_done_callback(
            lambda done: self._ended(name, talk, answer, pace, pace.words(was_started=was_started), done)
        )
        if self._flush_timer is not None:
            self._flush_timer.resume()

    async def _stream(self, name: str, talk: Talk, answer: Answer, pace: Pace) -> PanelError | None:
        """Take the pieces as they come; the error that came in the middle, if one did."""
        error = None
        chat = self._fleet.chat(name, talk.messages(), report=lambda step: self._step(talk, answer, step))
        async for event in chat:
            pace.see(event)
            answer.add(event.text, event.reasoning)
            if event.error is not None:
                error = PanelError(event.error)
        return error

    def _ended(
        self,
        name: str,
        talk: Talk,
        answer: Answer,
        pace: Pace,
        words: str,
        task: asyncio.Task[PanelError | None],
    ) -> None:
        del self._answering[name]
        raised = asyncio.CancelledError() if task.cancelled() else task.exception()
        error = task.result() if raised is None else expected(raised)
        stopped = raised is not None and error is None
        cut = "stopped: what was said is kept" if stopped else cut_words(pace.finish_reason)
        notes: list[Line] = []
        if words or cut:
            notes.append(((words, "muted"), (" · " if words and cut else "", "muted"), (cut, "warning")))
        if error is not None:
            said = "The answer is not whole. " if answer.text else ""
            notes.append(((f"{said}{error.what}", "bad"),))
            notes += [((error.cure, "muted"),)] if error.cure else []
        answer.end()
        answer.say(*notes)
        self._shown(talk, answer)
        if not self._answering and self._flush_timer is not None:
            self._flush_timer.pause()

    def _step(self, talk: Talk, answer: Answer, step: Progress) -> None:
        words = f"{step.model}: {step.phase} {step.detail}".rstrip()
        if step.fraction is not None:
            words += f"  {step.fraction * 100:.0f} %"
        answer.say(((words, "muted"),))
        self._shown(talk, answer)

    def _shown(self, talk: Talk, answer: Answer | None = None) -> None:
        """Show what changed, if it is looked at."""
        if self.is_attached and talk is self._talks.get(self._model or ""):
            self.transcript.grew(answer)

    def _flush(self) -> None:
        for name in self._answering:
            talk = self._talks[name]
            if talk.answer is not None and talk.answer.flush():
                self._shown(talk, talk.answer)

    def on_transcript_folded(self, message: Transcript.Folded) -> None:
        """Show an answer's reasoning, or hide it."""
        message.stop()
        message.answer.fold()
        self.transcript.grew(message.answer)

    def fold_last(self) -> bool:
        """The same for the last answer; False if it has no reasoning."""
        talk = self._talks.get(self._model or "")
        answer = talk.answer if talk is not None else None
        if answer is None or not answer.reasoning:
            return False
        answer.fold()
        self.transcript.grew(answer)
        return True

    def stop_answer(self) -> bool:
        """Stop one answer, the visible model's first, keeping what was said; False if there is none."""
        if not self._answering:
            return False
        name = self._model if self._model in self._answering else next(iter(self._answering))
        self._answering[name or ""].cancel()
        return True

    def last_answer(self) -> str | None:
        """The visible model's last answer, as it was written; None if there is none."""
        talk = self._talks.get(self._model or "")
        return talk.answer.text if talk is not None and talk.answer is not None and talk.answer.text else None

    def code(self) -> str | None:
        """The block of code under the mouse, else the last one that is seen."""
        code = self.transcript.code_in_sight()
        return None if code is None else code.text
