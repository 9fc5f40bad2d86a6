"""Where questions are typed on a terminal: several lines, pasted text of any length, earlier questions.

Imported late: only a conversation on a terminal needs prompt_toolkit, which takes 0.1 s.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
from collections.abc import Iterator, Sequence
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.key_processor import KeyPress
from prompt_toolkit.keys import Keys
from prompt_toolkit.output.vt100 import Vt100_Output

from vllm_sleep_tui.fleet.pictures import dropped

_PASTES, _NO_PASTES = "\x1b[?2004h", "\x1b[?2004l"
"""Have the terminal say what was pasted, and not."""


class LineEditor:
    """Reads questions from stdin, a terminal, and draws on stderr, or on stdout if that is the terminal."""

    def __init__(self, prompt: str, earlier: Sequence[str]) -> None:
        """`earlier` are questions that ↑ goes back to, the first one first."""
        self._input = _Input(sys.stdin)
        self._screen: TextIO = sys.stderr if sys.stderr.isatty() or not sys.stdout.isatty() else sys.stdout
        self._session: PromptSession[str] = PromptSession(
            prompt,
            multiline=True,
            history=InMemoryHistory(list(earlier)),
            key_bindings=_keys(),
            prompt_continuation=lambda width, _, wraps: "" if wraps else "… ".rjust(width),
            enable_open_in_editor=True,
            enable_suspend=True,
            input=self._input,
            output=self._output(),
        )

    async def read(self) -> str | None:
        """One question as it was typed; empty after Ctrl-C, None at the end or once the terminal is gone."""
        try:
            text = await self._session.prompt_async(handle_sigint=False)
        except KeyboardInterrupt:
            return ""
        except (EOFError, OSError):
            return None
        finally:
            self._tell(_PASTES)  # one that comes during the answer is one question, too
        return text.encode(errors="surrogateescape").decode(errors="replace").strip()

    def _output(self) -> Vt100_Output:
        output = Vt100_Output.from_pty(self._screen, term=os.environ.get("TERM"))
        # Not asked where the cursor is: an answer that comes late would be text of the next question.
        output.enable_cpr = False
        return output

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """For all the conversation: what is typed during an answer waits, undrawn, for the next `read`.

        Ctrl-C stays a signal. Line by line, as a terminal is at first, the kernel would cut at 4,095 bytes.
        """
        number = sys.stdin.fileno()
        try:
            before = termios.tcgetattr(number)
        except termios.error:
            yield
            return
        quiet = termios.tcgetattr(number)
        quiet[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR)
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        try:
            termios.tcsetattr(number, termios.TCSANOW, quiet)
            yield
        finally:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(number, termios.TCSANOW, before)
            self._tell(_NO_PASTES)

    def _tell(self, escape: str) -> None:
        with contextlib.suppress(OSError):
            self._screen.write(escape)
            self._screen.flush()


class _Input(Vt100Input):
    """Ends where its terminal is gone, of which the library's own takes no notice and goes round for ever."""

    def read_keys(self) -> list[KeyPress]:
        keys = super().read_keys()
        if not keys and _hung_up(self.fileno()):
            self.stdin_reader.closed = True
        return keys


def _hung_up(number: int) -> bool:
    watched = select.poll()
    watched.register(number, 0)
    return bool(watched.poll(0))  # of what was not asked for, only errors and a hang-up are told


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add(Keys.ControlM)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add(Keys.ControlJ)
    @keys.add(Keys.Escape, Keys.ControlM)
    def begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add(Keys.BracketedPaste)
    def paste(event: KeyPressEvent) -> None:
        text = event.data.replace("\r\n", "\n").replace("\r", "\n")
        marks = dropped(text)
        event.current_buffer.insert_text(text if marks is None else f"{marks} ")

    return keys
