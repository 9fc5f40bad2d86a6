"""What the dashboard's keys do in the chat."""

from __future__ import annotations

import asyncio
from typing import Any

from textual import work
from textual.app import SuspendNotSupported

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.conversations import Conversations
from vllm_sleep_tui.tui.screens.dialogs import Chooser
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.editor import edited
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.widgets.chat import ChatPane
from vllm_sleep_tui.tui.widgets.chat_status import cost_words


class ChatKeys(LookingScreen):
    """The part of the dashboard that is about its chat pane."""

    fleet: PanelFleet
    conversations: Conversations

    @property
    def selected(self) -> str | None:
        """The model under the table's cursor, with which the chat is."""
        raise NotImplementedError

    def acted_on(self) -> str | None:
        """The same, for a key; where there is none, the person is told."""
        raise NotImplementedError

    def action_chat(self) -> None:
        """Into the chat's input, at once: what is typed next is a question already."""
        if self.acted_on() is not None:
            self.add_class("-chatting")
            self.set_focus(self.query_one(ChatPane).input)

    def action_chat_zoom(self) -> None:
        """The chat over the whole screen, or beside the models again."""
        self.toggle_class("-zoomed")
        self.set_class(self.has_class("-zoomed"), "-chatting")

    def action_chat_new(self) -> None:
        """Begin a conversation."""
        self.query_one(ChatPane).new()

    def action_chat_parameters(self) -> None:
        """How the model is asked."""
        self.query_one(ChatPane).choose_parameters()

    def action_chat_chances(self) -> None:
        """How likely the tokens of an answer were."""
        self.query_one(ChatPane).show_chances()

    @work
    async def action_chat_list(self) -> None:
        """The conversations that were kept."""
        from vllm_sleep_tui.tui.screens.conversations import ConversationList

        chat = self.query_one(ChatPane)
        chosen = await self.app.push_screen_wait(ConversationList(self.conversations, chat.forgotten))
        if chosen is not None:
            self.add_class("-chatting")
            await chat.open_conversation(chosen)

    @work
    async def action_duel(self) -> None:
        """Ask another model the same."""
        chat = self.query_one(ChatPane)
        others = [model.name for model in self.fleet.snapshot().models if model.name != self.selected]
        if not chat.can_ask_another or not others:
            self.notify(
                f"Ask {self.selected} something first: another model is asked the same.", markup=False
            )
            return
        models = [(name, cost_words(self.fleet.predict(name)) or "is awake") for name in others]
        chooser = Chooser("Ask another model the same", models, "⏎ asks, esc does not")
        if (other := await self.app.push_screen_wait(chooser)) is not None:
            self.add_class("-chatting")
            chat.ask_another(other)

    def action_side_by_side(self) -> None:
        """The last two answers to one question beside each other."""
        self.query_one(ChatPane).side_by_side()

    @work(exclusive=True, group="editor")
    async def action_chat_editor(self) -> None:
        """Write the question in the person's own editor; answers and the gateway go on meanwhile."""
        chat = self.query_one(ChatPane)
        failed: PanelError | None = None
        try:
            with self.app.suspend():
                # No error may leave this block: the terminal would not be taken back.
                try:
                    text = await asyncio.to_thread(edited, chat.input.text)
                except PanelError as error:
                    failed = error
        except SuspendNotSupported:
            self.notify("An editor needs a terminal of its own.", severity="warning", markup=False)
            return
        if failed is not None:
            self.notify(f"{failed.what}\n{failed.cure}", severity="error", markup=False)
            return
        chat.input.text = text
        chat.input.move_cursor(chat.input.document.end)
        self.action_chat()

    def action_chat_again(self) -> None:
        """Ask the last question again."""
        self.query_one(ChatPane).regenerate()

    def action_chat_edit(self) -> None:
        """Ask the last question otherwise."""
        self.add_class("-chatting")
        self.query_one(ChatPane).edit()

    def action_chat_go_on(self) -> None:
        """Have a cut answer gone on with."""
        self.query_one(ChatPane).go_on()

    def action_copy_answer(self) -> None:
        """What is selected, else the last answer, to the clipboard."""
        if selected := self.get_selected_text():
            self.app.copy_to_clipboard(selected)
        elif text := self.query_one(ChatPane).last_answer():
            self.copy(text, "the answer")
        else:
            self.notify(f"{self.selected} has not answered anything yet.", markup=False)

    def action_copy_code(self) -> None:
        """The block of code under the mouse, else the last one that is seen, to the clipboard."""
        if text := self.query_one(ChatPane).code():
            self.copy(text, "the code")
        else:
            self.notify("There is no block of code in sight.", markup=False)

    def action_fold(self) -> None:
        """Show the reasoning of the last answer, or hide it."""
        if not self.query_one(ChatPane).fold_last():
            self.notify(f"The last answer of {self.selected} has no reasoning.", markup=False)

    def copy(self, text: str, what: str) -> None:
        """To the clipboard, with a word on how far it came."""
        app: Any = self.app
        app.copy_to_clipboard(text, what)
