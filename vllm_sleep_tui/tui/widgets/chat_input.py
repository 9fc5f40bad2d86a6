"""Where questions are typed."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from vllm_sleep_tui.fleet.pictures import dropped


class ChatInput(TextArea):
    """Enter sends; alt+enter and ctrl+j begin a line; a pasted text keeps its lines; @FILE shows a picture.

    In the first line ↑ goes to earlier questions, in the last one ↓ comes back from them.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+j,alt+enter,shift+enter", "newline", "new line", show=False),
        Binding("pageup", "page(-0.9)", "scroll", show=False),
        Binding("pagedown", "page(0.9)", "scroll", show=False),
        Binding("ctrl+up", "page(-0.1)", "scroll", show=False),
        Binding("ctrl+down", "page(0.1)", "scroll", show=False),
    ]

    class Sent(Message):
        """The person sent a question."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Paged(Message):
        """The person wants to see what was said before, or after, by so many screens."""

        def __init__(self, pages: float) -> None:
            super().__init__()
            self.pages = pages

    def __init__(self, *, id: str) -> None:
        super().__init__(id=id, compact=True, highlight_cursor_line=False)
        self.earlier: list[str] = []
        """What was asked before, the first one first."""
        self._aside: list[str] = []
        """What had to make room here, and was neither asked nor thrown away by the person."""
        self._recalled: int | None = None
        self._draft = ""

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            self._send()
        elif not self._recalls(event.key):
            await super()._on_key(event)
            return
        event.prevent_default()
        event.stop()

    async def _on_paste(self, event: events.Paste) -> None:
        """A picture that is dropped on the terminal comes as its path: it becomes a mark."""
        if (marks := dropped(event.text)) is not None:
            event.prevent_default()  # else the text area's own handler is called next
            event.stop()
            self.insert(f"{marks} ")

    def _recalls(self, key: str) -> bool:
        """Go through what was asked; False if the key does not do that where the cursor is."""
        if key == "up" and self.cursor_at_first_line:
            return self._recall(-1)
        return key == "down" and self.cursor_at_last_line and self._recall(1)

    def _send(self) -> None:
        if text := self.text.strip():
            self.post_message(self.Sent(text))
            self.clear()
            self._aside = [aside for aside in self._aside if aside != text]
        self._recalled = None

    def give_back(self, text: str) -> bool:
        """Put a question back that was not asked; typing replaces it, and ↑ goes to it then.

        False where another one is begun.
        """
        self._set_aside(text)
        if self.text:
            return False
        self.text = text
        self.select_all()
        return True

    def put(self, text: str) -> bool:
        """Have this changed and sent; True if something was begun here, to which ↑ goes."""
        if was_begun := bool(self.text.strip()) and self.text != text:
            self._set_aside(self.text)
        self._recalled, self.text = None, text
        self.move_cursor(self.document.end)
        return was_begun

    def _set_aside(self, text: str) -> None:
        self._aside = [*(aside for aside in self._aside if aside != text), text]

    def action_newline(self) -> None:
        """Begin a line."""
        self.replace("\n", *self.selection, maintain_selection_offset=False)

    def action_page(self, pages: float) -> None:
        """Scroll what was said."""
        self.post_message(self.Paged(pages))

    def _recall(self, step: int) -> bool:
        """An earlier question or a later one; False if there is none."""
        earlier = [*(asked for asked in self.earlier if asked not in self._aside), *self._aside]
        if not earlier or (self._recalled is None and step > 0):
            return False
        if self._recalled is None:
            self._draft = self.text
            at = len(earlier) - 1
        else:
            at = self._recalled + step
        if at < 0:
            return True
        if at >= len(earlier):
            self._recalled, self.text = None, self._draft
        else:
            self._recalled, self.text = at, earlier[at]
        self.move_cursor(self.document.end)
        return True
