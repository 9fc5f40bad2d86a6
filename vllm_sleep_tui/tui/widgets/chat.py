"""The chat pane: ask the selected model; asleep, it is switched to first."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message
from textual.timer import Timer

from vllm_sleep_tui.errors import OperationError, PanelError
from vllm_sleep_tui.fleet.conversations import Conversations
from vllm_sleep_tui.fleet.pictures import pictures_in
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, Prediction, Progress, SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, beside
from vllm_sleep_tui.tui.drawing.preview import Preview, looked_at
from vllm_sleep_tui.tui.drawing.turns import Answer
from vllm_sleep_tui.tui.screens.dialogs import Choice, Question
from vllm_sleep_tui.tui.state.operations import Operations, Running, expected
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.talk import Entry, Talk
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.theme import palette_of
from vllm_sleep_tui.tui.widgets.chat_input import ChatInput
from vllm_sleep_tui.tui.widgets.chat_status import ChatStatus
from vllm_sleep_tui.tui.widgets.transcript import Transcript
from vllm_sleep_tui.tui.words import expected_time, phases_of, state_words
from vllm_sleep_tui.units import time_of_day, took

FLUSH_SECONDS = 0.1
KEEP_SECONDS = 2.0
"""How often an answer under way is kept: so much is lost if the panel is killed."""
ROOM_TOKENS = 256
"""What an answer needs at least; a prompt that leaves less is asked about."""
GO_ON = "Go on exactly where you stopped."
_NOTHING: Line = (("Nothing said yet.", "muted"),)
_HINT: Line = (("Nothing said yet; c asks.", "muted"),)
_TOLD = (State.AWAKE, State.ASLEEP, State.STOPPED, State.FAILED)


class ChatPane(Vertical):
    """A conversation for each model, and one input for the selected one."""

    class Edited(Message):
        """What enter does in the input may be something else now."""

    def __init__(
        self,
        fleet: PanelFleet,
        operations: Operations,
        conversations: Conversations,
        *,
        id: str | None = None,
    ) -> None:
        super().__init__(id=id)
        self._fleet = fleet
        self._operations = operations
        self._store = conversations
        self._talks: dict[str, Talk] = {}
        self._answering: dict[str, tuple[Talk, Entry, asyncio.Task[PanelError | None]]] = {}
        self._contexts: dict[str, int] = {}
        """The longest context of each model, in tokens, as far as its server has told."""
        self._agreed: set[tuple[str, ...]] = set()
        """What the person agreed to while this panel runs: a model, and who sleeps for it."""
        self._edited: Entry | None = None
        """The question that is being written anew in the input; it stands until the new one is sent."""
        self._states: dict[str, State] = {}
        self._model: str | None = None
        self._view: View | None = None
        self._flush_timer: Timer | None = None
        self._kept_at = 0.0
        self._is_loss_told = False

    def compose(self) -> ComposeResult:
        """What was said, who would answer, and the input."""
        yield Transcript(id="transcript")
        yield ChatStatus(id="chat-status")
        yield ChatInput(id="question")

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

    @property
    def _talk(self) -> Talk | None:
        return self._talks.get(self._model or "")

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────

    def show(self, view: View) -> None:
        """Turn to the selected model."""
        self._view = view
        self._tell_changes(view.snapshot)
        if view.selected is not None and view.selected != self._model:
            self._leave()
            self._model = view.selected
            self._turn_to(self._talks.get(view.selected) or self._begun(view.selected))
        self._show_status()
        if self._store.note is not None and not self._is_loss_told:
            self._is_loss_told = True
            self.notify(self._store.note, severity="warning", timeout=12, markup=False)

    def _leave(self) -> None:
        if (talk := self._talk) is not None:
            talk.row_at_top = self.transcript.row_at_top

    def _begun(self, model: str) -> Talk:
        """A talk with a model, which goes on with what was said in an earlier run once that is read."""
        talk = self._talks[model] = Talk(self._store, model)
        self._operations.spawn(self._resume(talk))
        return talk

    async def _resume(self, talk: Talk) -> None:
        kept = await asyncio.wrap_future(self._store.latest(talk.handle.model))
        if kept is not None:
            await self._open(talk.handle.model, kept.id, instead_of=talk)

    async def open_conversation(self, id: int) -> None:
        """Go on with a conversation, with the selected model."""
        if self._model is not None and self._is_free(self._model):
            await self._open(self._model, id, instead_of=self._talks.get(self._model))

    async def _open(self, model: str, id: int, *, instead_of: Talk | None) -> None:
        whole = await asyncio.wrap_future(self._store.whole(id))
        is_current = self._talks.get(model) is instead_of and model not in self._answering
        if whole is None or not is_current or self._view is None or not self.is_attached:
            return
        talk = Talk(self._store, model, id, whole.parameters)
        talk.restore(whole.turns, self._view.colors)
        self._talks[model] = talk
        if model == self._model:
            self._turn_to(talk)

    def _turn_to(self, talk: Talk) -> None:
        self.input.earlier = talk.questions
        self.post_message(self.Edited())
        self.transcript.show(talk.turns, self._hint, at=talk.row_at_top)
        self._show_status()
        if self._view is not None:
            self._title(self._view)

    @property
    def _hint(self) -> Line:
        """What stands where nothing was said; the way to the input only for who is not in it."""
        return _NOTHING if self.input.has_focus else _HINT

    def _turn_hint(self) -> None:
        if (talk := self._talk) is not None and not talk.turns:
            self.transcript.show(talk.turns, self._hint)

    def on_descendant_focus(self) -> None:
        """Into the input."""
        self._turn_hint()
        self._name_keys()

    def on_descendant_blur(self) -> None:
        """Out of it."""
        self._turn_hint()
        self._name_keys()

    def _show_status(self) -> None:
        if self._view is not None:
            used = None if self._talk is None else self._talk.tokens_used(self.input.text)
            self.query_one(ChatStatus).show(self._view, used, self._contexts.get(self._model or ""))

    def _tell_changes(self, snapshot: FleetSnapshot) -> None:
        """A model that was talked with and that others put to sleep, or that died, is told of in its talk."""
        for model in snapshot.models:
            before = self._states.get(model.name)
            if model.state in _TOLD:
                self._states[model.name] = model.state
            talk = self._talks.get(model.name)
            if before in (None, model.state) or model.state not in _TOLD or talk is None or not talk.turns:
                continue
            if model.state is State.AWAKE and before is not State.FAILED:
                continue  # an answer or the line above the input says it
            is_failed = model.state is State.FAILED
            words = f"{time_of_day(time.time())} {model.name}: {state_words(model.state, model.level)}"
            if is_failed:
                words += "; key n says why"  # in full, and more surely than at this moment
            talk.tell(words, "bad" if is_failed else "muted", passes=not is_failed)
            self._shown(talk)

    def _title(self, view: View) -> None:
        name = self._model or ""
        color = self._paint(view.colors[name])
        asked = self._talk.parameters.words() if self._talk is not None else ""
        title = ("Chat with ", (name, f"bold {color}"), f" · {asked}" if asked else "")
        self.border_title = Text.assemble(*title).markup
        self._name_keys()
        self.input.placeholder = f"Ask {name} …  alt+⏎ new line"

    def _name_keys(self) -> None:
        """Only keys that do what is said: in the input letters are text."""
        self.border_subtitle = "new ^n" if self.input.has_focus else "new ^n · all h · ask p · zoom z"

    def recolor(self) -> None:
        """Follow a change of theme."""
        if self._view is not None and self._model is not None:
            self._title(self._view)
        self.transcript.refresh()

    def _paint(self, paint: str) -> str:
        color = palette_of(self).style(paint).color
        return color.name if color is not None else "default"

    def on_chat_input_paged(self, message: ChatInput.Paged) -> None:
        """Scroll what was said without leaving the input."""
        message.stop()
        self.transcript.scroll_pages(message.pages)

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────

    def on_chat_input_sent(self, message: ChatInput.Sent) -> None:
        """Ask the selected model."""
        message.stop()
        if self._model is not None:
            replaces, edited = self.is_editing, self._edited
            self._edit(None)
            self._send(self._model, message.text, again=replaces, edited=edited)

    def on_text_area_changed(self) -> None:
        """A question that is being edited is left as it is once nothing of it is in the input."""
        if not self.input.text:
            self._edit(None)

    @property
    def is_editing(self) -> bool:
        """Whether what is sent takes the place of the last question and its answer."""
        return self._edited is not None and self._talk is not None and self._edited is self._talk.last_asked

    def _edit(self, entry: Entry | None) -> None:
        self._edited = entry
        self.post_message(self.Edited())

    @work
    async def _send(self, name: str, text: str, *, again: bool = False, edited: Entry | None = None) -> None:
        """Ask, once the person knows what it costs; a question that is not asked goes back into the input.

        One that is asked `again`, `edited` or as it was, takes the place of the last question and its answer,
        and not before.
        """
        is_same = again and text == self._talks[name].asked
        shows = await self._shows(name, text) if self._is_free(name) else None
        was_coming = self._comes_awake(name)
        if shows is not None and await self._agrees(name):
            # The same prompt found room before.
            talk = self._talks[name] if is_same else await self._with_room(name, text)
            leaves_out = talk is not None and await self._is_blind_to(name, talk)
            # What was to make it awake may have failed meanwhile, or somebody put it to sleep.
            agrees = not was_coming or self._comes_awake(name) or await self._agrees(name)
            # While it was asked about, nothing else began; from here on nothing can.
            if talk is not None and agrees and self._is_free(name) and talk is self._talks[name]:
                if again:
                    self._take_back(talk)
                if leaves_out:
                    talk.blind.add(name)
                    words = f"{name} reads text alone: the pictures of this conversation are left out."
                    talk.tell(words, "warning")
                self._ask(name, talk, text, shows)
                return
        if (not is_same or edited is not None) and self._give_back(text):
            self._edit(edited)

    def _give_back(self, text: str) -> bool:
        """Whether it is in the input again; else the person is told where it is."""
        if not (is_back := self.input.give_back(text)):
            self._tell_aside()
        return is_back

    def _tell_aside(self) -> None:
        words = "What was not asked is kept while you write something else: ↑ in the input goes to it."
        self.notify(words, markup=False)

    async def _shows(self, name: str, text: str) -> list[Preview] | None:
        """The pictures that a question names; None if they cannot be sent, and the person is told why."""
        if "@" not in text:
            return []
        try:
            pictures = await asyncio.to_thread(pictures_in, text)
            await self._fleet.check_sees(name, pictures)
            return await asyncio.to_thread(lambda: [looked_at(picture) for picture in pictures])
        except PanelError as error:
            self.notify(f"{error.what}\n{error.cure}", severity="warning", markup=False)
            return None

    async def _is_blind_to(self, name: str, talk: Talk) -> bool:
        """Whether a model is newly known to read text alone, and is not shown what was asked about before."""
        pictures = [picture for message in talk.messages() for picture in message.get("pictures", ())]
        if name in talk.blind or not pictures:
            return False
        try:
            await self._fleet.check_sees(name, pictures)
        except PanelError:
            return True
        return False

    def _is_free(self, name: str) -> bool:
        """Whether a model may be asked now; if not, the person is told."""
        if name in self._answering:
            self.notify(f"{name} is still answering; escape stops it.", markup=False)
        return name not in self._answering

    def _is_awake(self, name: str) -> bool:
        """Whether it is awake; not if the config has no such model any more."""
        models = self._fleet.snapshot().models
        return any(model.name == name and model.state is State.AWAKE for model in models)

    def _comes_awake(self, name: str) -> bool:
        """Whether it is awake, or the person's own operation makes it so."""
        return self._is_awake(name) or self._operations.brings(name) is not None

    async def _agrees(self, name: str) -> bool:
        """Whether what comes before the answer was asked for: a start always is, an eviction once.

        Nothing is asked while the person's own operation makes the model awake: the question waits for it.
        """
        if self._comes_awake(name):
            return True
        prediction = self._fleet.predict(name)
        victims = (*prediction.sleeps, *prediction.stops)
        if prediction.action == "start":
            title, choice = f"Start {name}?", Choice("y", "Start and ask", "yes")
        elif victims and (name, *victims) not in self._agreed:
            title, choice = f"Switch to {name}?", Choice("y", "Switch and ask", "yes")
        else:
            return True
        if not await self.app.push_screen_wait(Question(title, _sentence(prediction), [choice])):
            return False
        self._agreed.add((name, *victims))
        return True

    async def _with_room(self, name: str, text: str) -> Talk | None:
        """The conversation whose context has room for the question, if need be after the person chose how.

        None if they chose not to ask.
        """
        talk = self._talks[name]
        used, limit = talk.tokens_used(text), self._contexts.get(name)
        if used is None or limit is None or used + ROOM_TOKENS <= limit:
            return talk
        words = (
            f"The conversation has about {used:,} tokens of the {limit:,} that {name} can hold, "
            "which leaves little or nothing for an answer."
        )
        choices = [
            Choice("d", "Drop the oldest", "drop"),
            Choice("n", "New conversation", "new"),
            Choice("s", "Send", "send"),
        ]
        answer = await self.app.push_screen_wait(Question("The context is full", words, choices))
        if answer is None:
            return None
        if answer == "new":
            self.new()
        elif answer == "drop":
            share = max(0.0, 1 - (limit - ROOM_TOKENS) / used)
            size = sum(len(turn["content"]) for turn in talk.messages())
            goal = size * (1 - share - 0.1)
            while sum(len(turn["content"]) for turn in talk.messages()) > goal and talk.drop_first():
                pass
            self.transcript.show(talk.turns, self._hint)
        return self._talks[name]

    def _ask(self, name: str, talk: Talk, text: str, shows: list[Preview]) -> None:
        view = self._view
        assert view is not None
        was_started = view.snapshot.model(name).state not in (State.AWAKE, State.ASLEEP)
        entry = talk.ask(text, name, view.colors[name], was_started=was_started, shows=shows)
        self.input.earlier = talk.questions
        self.post_message(self.Edited())
        self._shown(talk)
        if talk is self._talk:
            self.transcript.to_end()
        bringing = self._operations.brings(name)
        task = self._operations.spawn(self._stream(name, talk, entry, talk.messages(), bringing))
        self._follow(name, talk, entry, task, text)

    def _follow(
        self, name: str, talk: Talk, entry: Entry, task: asyncio.Task[PanelError | None], text: str
    ) -> None:
        self._answering[name] = (talk, entry, task)
        # The end is a callback for the reason that `Operations` gives.
        task.add_done_callback(lambda done: self._ended(name, talk, entry, text, done))
        if self._flush_timer is not None:
            self._flush_timer.resume()

    @work
    async def ask_another(self, other: str) -> None:
        """Ask another model the last question, in the same conversation."""
        talk, view = self._talk, self._view
        if talk is None or view is None or other in self._answering or self._model in self._answering:
            self.notify("An answer is still under way; escape stops it.", markup=False)
            return
        messages = talk.last_question()
        if not messages or not await self._agrees(other):
            return
        was_started = view.snapshot.model(other).state not in (State.AWAKE, State.ASLEEP)
        entry = talk.ask_another(other, view.colors[other], was_started=was_started)
        self._shown(talk)
        self.transcript.to_end()
        bringing = self._operations.brings(other)
        task = self._operations.spawn(self._stream(other, talk, entry, messages, bringing))
        self._follow(other, talk, entry, task, "")
        self.side_by_side()

    def side_by_side(self) -> None:
        """The last two answers to one question beside each other."""
        from vllm_sleep_tui.tui.screens.duel import DuelScreen  # as every screen: when it is opened

        talk = self._talk
        question = None if talk is None else talk.asked
        if talk is None or question is None or (pair := talk.pair()) is None:
            self.notify("One question has to be answered by two models first (d).", markup=False)
            return
        self.app.push_screen(DuelScreen(question, pair, self._fleet.snapshot))

    async def _stream(
        self,
        name: str,
        talk: Talk,
        entry: Entry,
        messages: list[dict[str, Any]],
        bringing: Running | None,
    ) -> PanelError | None:
        """Take the pieces as they come; the error that came in the middle, if one did.

        `bringing` is the person's own operation that it waits for.
        """
        error, pace, answer = None, entry.pace, entry.turn
        assert isinstance(answer, Answer)
        if bringing is not None:
            await self._brought(name, talk, answer, bringing)
        chat = self._fleet.chat(
            name,
            messages,
            params=entry.parameters.body(),
            report=lambda step: self._step(talk, answer, step),
        )
        async for event in chat:
            if pace.is_new:  # what was told of the way there is over
                answer.say_above(*_phases(event.switch_times))
            pace.see(event)
            answer.add(event.text, event.reasoning)
            answer.call(event.calls)
            answer.chances += event.chances
            if event.error is not None:
                error = PanelError(event.error)
        return error

    async def _brought(self, name: str, talk: Talk, answer: Answer, bringing: Running) -> None:
        """Wait for the operation that makes the model awake; raises OperationError if it did not.

        Asked at once, the question would begin an operation of its own where that one fails, which nobody
        agreed to.
        """
        answer.say_above(((f"{bringing.doing}; asked once it is awake", "muted"),))
        self._shown(talk, answer)
        await self._operations.settled([name])
        if not self._is_awake(name):
            raise OperationError(
                f"{name} was not asked: {bringing.doing} did not make it awake.", "Ask it again."
            )

    def _ended(
        self, name: str, talk: Talk, entry: Entry, text: str, task: asyncio.Task[PanelError | None]
    ) -> None:
        del self._answering[name]
        answer = entry.turn
        assert isinstance(answer, Answer)
        raised = asyncio.CancelledError() if task.cancelled() else task.exception()
        error = task.result() if raised is None else expected(raised)
        answer.end()
        if error is not None:
            entry.error, entry.cure = error.what, error.cure
            answer.say_above()
        elif raised is not None:
            entry.pace.finish_reason = "stopped"
        if entry.pace.context_tokens is not None:
            self._contexts[name] = entry.pace.context_tokens
        answer.say(*entry.note())
        talk.keep(entry)
        if name != talk.handle.model and answer.text and (words := talk.compare()):
            talk.tell(words, "muted")
        self._shown(talk, answer)
        self._shown(talk)
        if not answer.text and error is not None and self.is_attached and talk is self._talk:
            self._give_back(text)
        if not self._answering and self._flush_timer is not None:
            self._flush_timer.pause()

    def _step(self, talk: Talk, answer: Answer, step: Progress) -> None:
        words = f"{step.model}: {step.phase} {step.detail}".rstrip()
        if step.fraction is not None:
            words += f"  {step.fraction * 100:.0f} %"
        answer.say_above(((words, "muted"),))
        self._shown(talk, answer)

    def _shown(self, talk: Talk, answer: Answer | None = None) -> None:
        """Show what changed, if it is looked at."""
        if self.is_attached and talk is self._talk and (answer is None or answer in talk.turns):
            self.transcript.grew(answer)

    def _flush(self) -> None:
        now = time.monotonic()
        keeps = now >= self._kept_at + KEEP_SECONDS
        self._kept_at = now if keeps else self._kept_at
        for talk, entry, _ in self._answering.values():
            answer = entry.turn
            if isinstance(answer, Answer) and answer.flush():
                self._shown(talk, answer)
                if keeps:
                    talk.keep(entry, is_whole=False)

    def stop_answer(self) -> bool:
        """Stop one answer, the visible model's first, keeping what was said; False if there is none."""
        if not self._answering:
            return False
        name = self._model if self._model in self._answering else next(iter(self._answering))
        self._answering[name or ""][2].cancel()
        return True

    # ── what the keys do ─────────────────────────────────────────────────────────────────────────────────

    def new(self) -> None:
        """Begin a conversation; the one before is kept."""
        if self._model is None or self._model in self._answering:
            self.notify(f"{self._model} is still answering; escape stops it.", markup=False)
            return
        before = self._talks[self._model]
        talk = self._talks[self._model] = Talk(self._store, self._model, parameters=before.parameters)
        self._turn_to(talk)

    def forgotten(self, id: int) -> None:
        """The conversation was deleted: whoever shows it begins anew."""
        for name, talk in list(self._talks.items()):
            if talk.handle.id == id and name not in self._answering:
                self._talks[name] = Talk(self._store, name, parameters=talk.parameters)
                if name == self._model:
                    self._turn_to(self._talks[name])

    def regenerate(self) -> None:
        """Ask the last question again; the answer that it replaces is kept, and not shown."""
        if (text := self._asked_last()) is not None and self._model is not None:
            self._send(self._model, text, again=True)

    def edit(self) -> None:
        """Put the last question into the input; once sent, it takes the place of that and its answer."""
        text, talk = self._asked_last(), self._talk
        if text is not None and talk is not None:
            if self.input.put(text):
                self._tell_aside()
            self._edit(talk.last_asked)
            self.screen.set_focus(self.input)

    def _asked_last(self) -> str | None:
        """The last question, where it can be asked otherwise; else the person is told why not."""
        talk = self._talk
        if talk is None or not self._is_free(talk.handle.model):
            return None
        if talk.asked is None:
            self.notify("Nothing was asked yet.", markup=False)
        return talk.asked

    def _take_back(self, talk: Talk) -> None:
        talk.drop_last()
        if talk is self._talk:
            self.transcript.show(talk.turns, self._hint)

    def go_on(self) -> None:
        """Have an answer that was cut gone on with."""
        last = None if self._talk is None else self._talk.last
        if self._model is None or last is None:
            self.notify("There is no answer to go on with.", markup=False)
        elif last.is_whole:
            self.notify("That answer was not cut.", markup=False)
        else:
            self._send(self._model, GO_ON)

    @work
    async def choose_parameters(self) -> None:
        """How the conversation's next questions are asked."""
        from vllm_sleep_tui.tui.screens.parameters import ParametersScreen

        talk, model = self._talk, self._model
        if talk is None or model is None:
            return
        loaded = self._fleet.loaded
        screen = ParametersScreen(
            model,
            talk.parameters,
            self._store.presets,
            loaded.config.presets,
            self._store.keep_preset,
            self._store.forget_preset,
        )
        chosen = await self.app.push_screen_wait(screen)
        if chosen is not None:
            talk.parameters = chosen
            if self._view is not None:
                self._title(self._view)

    def show_chances(self) -> None:
        """How likely the tokens of the answer under the mouse were, else those of the last one."""
        from vllm_sleep_tui.tui.screens.chances import ChancesScreen

        answer = self.transcript.answer_in_sight()
        if answer is None or not answer.chances:
            words = (
                "That answer came without probabilities: ask for them by `logprobs` (p), then ask again (^r)."
            )
            self.notify(words, markup=False)
        else:
            self.app.push_screen(ChancesScreen(answer.speaker, answer.chances))

    def on_transcript_folded(self, message: Transcript.Folded) -> None:
        """Show an answer's reasoning, or hide it."""
        message.stop()
        message.answer.fold()
        self.transcript.grew(message.answer)

    def fold_last(self) -> bool:
        """The same for the last answer; False if it has no reasoning."""
        answer = self._talk.answer if self._talk is not None else None
        if answer is None or not answer.reasoning:
            return False
        answer.fold()
        self.transcript.grew(answer)
        return True

    def last_answer(self) -> str | None:
        """The visible model's last answer, as it was written; None if there is none."""
        answer = self._talk.answer if self._talk is not None else None
        return answer.text if answer is not None and answer.text else None

    @property
    def can_ask_another(self) -> bool:
        """Whether there is a question that another model can be asked, too."""
        return self._talk is not None and bool(self._talk.last_question())

    def code(self) -> str | None:
        """The block of code under the mouse, else the last one that is seen."""
        code = self.transcript.code_in_sight()
        return None if code is None else code.text


def _phases(times: SwitchTimes | None) -> list[Line]:
    """What a switch took, phase by phase, in a line above the answer; none without one."""
    phases = [] if times is None else phases_of(times)
    words = beside(f"{phase} {took(seconds)}" for phase, seconds in phases)
    return [((words, "muted"),)] if words else []


def _sentence(prediction: Prediction) -> str:
    """What would be done and how long that takes, for a question; all that `cost_words` names is in it."""
    about = expected_time(prediction)
    return (f"About {about}. " if about else "") + prediction.sentence
