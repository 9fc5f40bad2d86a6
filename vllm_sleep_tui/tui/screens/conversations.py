"""The conversations that were kept: find one, go on with it, rename, export or delete it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.files import is_taken, write_private
from vllm_sleep_tui.fleet.conversations import Conversations, Kept, as_json, as_markdown
from vllm_sleep_tui.paths import here
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.paint import left, middle
from vllm_sleep_tui.tui.screens.dialogs import Choice, KeyedBox, Question
from vllm_sleep_tui.tui.widgets.find_line import FindLine
from vllm_sleep_tui.units import counted, date_and_time

PAGE = 200
"""Conversations that are read at once; at the end of them the next ones are."""
_MAX_NAME = 16
"""Cells of a model's name."""
_KEYS = "esc back  ⏎ open  / find  r rename  x delete  e export  J as JSON"


class ConversationList(ModalScreen[int | None]):
    """The list; its result is the id of the one to go on with."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "back", show=False),
        Binding("slash", "find", "find", show=False),
        Binding("j", "down", "down", show=False),
        Binding("k", "up", "up", show=False),
        Binding("r", "rename", "rename", show=False),
        Binding("e", "export('md')", "export", show=False),
        Binding("J", "export('json')", "export", show=False),
        Binding("x", "delete", "delete", show=False),
    ]

    def __init__(self, store: Conversations, forgotten: Callable[[int], None]) -> None:
        super().__init__()
        self._store = store
        self._forgotten = forgotten
        self._kept: list[Kept] = []
        self._most = PAGE
        """So many are listed; at the end of them more are."""
        self._renaming: int | None = None

    def compose(self) -> ComposeResult:
        """Words to find by, and the list."""
        with KeyedBox(_KEYS, classes="dialog wide") as box:
            box.border_title = "Conversations"
            yield FindLine(Input(placeholder="words of titles, questions and answers"))
            yield OptionList(id="conversations")

    def on_mount(self) -> None:
        """All of them, the latest first."""
        self.query_one(OptionList).focus()
        self._fill()

    @work(exclusive=True, group="list")
    async def _fill(self) -> None:
        words = "" if self._renaming is not None else self.query_one(Input).value
        before = self._at
        self._kept = await asyncio.wrap_future(self._store.listed(words, self._most))
        options = self.query_one(OptionList)
        ids = [kept.id for kept in self._kept]
        options.clear_options()
        widest = max((cell_len(clean(kept.model)) for kept in self._kept), default=0)
        options.add_options([Option(_line(kept, widest), id=str(kept.id)) for kept in self._kept])
        if self._kept:
            options.highlighted = ids.index(before.id) if before is not None and before.id in ids else 0
        elif not words:
            note = self._store.note or "Nothing is kept yet."
            if not self._store.keeps:
                note = "The config says `keep_conversations: false`: nothing that is said now is kept."
            options.add_option(Option(Text(note), disabled=True))

    @property
    def _at(self) -> Kept | None:
        number = self.query_one(OptionList).highlighted
        return None if number is None or number >= len(self._kept) else self._kept[number]

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Go on with it."""
        if event.option.id is not None:
            self.dismiss(int(event.option.id))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """At the end of those that are listed, list more."""
        if event.option_index == self._most - 1:
            self._most += PAGE
            self._fill()

    def on_input_changed(self) -> None:
        """Find while the person types."""
        if self._renaming is None:
            self._most = PAGE
            self._fill()

    @work
    async def on_input_submitted(self, event: Input.Submitted) -> None:
        """Take the new title; or go to what was found."""
        if self._renaming is not None:
            try:
                renamed = self._store.rename(self._renaming, event.value)
            except PanelError as error:
                self.notify(f"{error.what}\n{error.cure}", severity="error", markup=False)
                return
            await asyncio.wrap_future(renamed)
            self._end_renaming()
        self.query_one(OptionList).focus()

    def _end_renaming(self) -> None:
        self._renaming = None
        self.query_one(FindLine).mark()
        self.query_one(Input).value = ""
        self._fill()

    def action_back(self) -> None:
        """Out of the input; else close."""
        if self._renaming is not None:
            self._end_renaming()
        if self.query_one(Input).has_focus:
            self.query_one(OptionList).focus()
        else:
            self.dismiss(None)

    def action_find(self) -> None:
        """Into the input, at once: the next letter belongs to it, and `x` deletes."""
        self.set_focus(self.query_one(Input))

    def action_down(self) -> None:
        """The next one."""
        self.query_one(OptionList).action_cursor_down()

    def action_up(self) -> None:
        """The one before."""
        self.query_one(OptionList).action_cursor_up()

    def action_rename(self) -> None:
        """Type another title."""
        if (kept := self._at) is not None:
            self._renaming = kept.id
            self.query_one(FindLine).mark("title")
            self.query_one(Input).value = kept.title
            self.set_focus(self.query_one(Input))

    @work
    async def action_export(self, kind: str) -> None:
        """Write it into the current folder, readable by this user alone."""
        kept = self._at
        whole = None if kept is None else await asyncio.wrap_future(self._store.whole(kept.id))
        if whole is None:
            return
        path = _free_name(whole.title, kind)
        content = as_json(whole) if kind == "json" else as_markdown(whole).encode()
        try:
            write_private(path, content)
        except PanelError as error:
            self.notify(f"{error.what}\n{error.cure}", severity="error", markup=False)
            return
        self.notify(f"Exported as {path}.", markup=False)

    @work
    async def action_delete(self) -> None:
        """Forget it, after a question."""
        kept = self._at
        if kept is None:
            return
        turns = counted(kept.turns, "turn")
        words = f"{clean(kept.title)}\n{turns} with {kept.model}. It cannot be brought back."
        choices = [Choice("y", "Delete it", "delete")]
        if await self.app.push_screen_wait(Question("Delete this conversation?", words, choices)):
            await asyncio.wrap_future(self._store.delete(kept.id))
            self._forgotten(kept.id)
            self._fill()


def _line(kept: Kept, widest: int) -> Text:
    """One row; `widest` is the cells that the longest model's name takes."""
    width = min(widest, _MAX_NAME)
    return Text.assemble(
        f"{date_and_time(kept.changed)}  ",
        (left(middle(clean(kept.model), width), width), "bold"),
        f"  {clean(kept.title)} · {counted(kept.turns, 'turn')}",
        no_wrap=True,
        overflow="ellipsis",
    )


def _free_name(title: str, kind: str) -> Path:
    """A file of the current folder that is not there yet, called after the title."""
    safe = "".join(char if char.isalnum() else "-" for char in clean(title)).strip("-")[:60] or "conversation"
    path, number = here().absolute() / f"{safe}.{kind}", 2
    while is_taken(path):
        path, number = path.with_name(f"{safe}-{number}.{kind}"), number + 1
    return path
