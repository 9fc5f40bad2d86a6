"""The panel's application: themes, the palette of commands, leaving."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec
from textual import work
from textual.app import App
from textual.driver import Driver
from textual.drivers.linux_driver import LinuxDriver
from textual.events import InputEvent
from textual.filter import LineFilter
from textual.message import Message
from textual.notifications import Notification, Notify, SeverityLevel
from textual.theme import Theme

from vllm_sleep_tui import files, paths
from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.files import read_regular
from vllm_sleep_tui.fleet.conversations import Conversations
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import RUNNING
from vllm_sleep_tui.gateway.post import Post
from vllm_sleep_tui.leaving import Leaving, leave_at_once
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.paint import cut, wrap
from vllm_sleep_tui.tui.screens.dashboard import Dashboard
from vllm_sleep_tui.tui.screens.dialogs import ThemeChooser
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.clipboard import to_tmux, words
from vllm_sleep_tui.tui.state.config_watch import Agrees, ConfigWatch
from vllm_sleep_tui.tui.state.failure import TOLD_SECONDS, Failure, ToldFailures
from vllm_sleep_tui.tui.state.hands import Hands
from vllm_sleep_tui.tui.state.operations import Operations
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.terminal import CLEANED, PanelDriver
from vllm_sleep_tui.tui.theme import (
    DEFAULT_THEME,
    Palette,
    ThemeFile,
    load_themes,
    package_folder,
    textual_theme,
)
from vllm_sleep_tui.units import counted

if TYPE_CHECKING:
    from textual.command import Provider

    from vllm_sleep_tui.config.load import LoadedConfig


READING_SECONDS = 1.0
REST_SECONDS = 0.5
CLEAN_DUE, CLEAN_OVERDUE = 10, 60
"""So many looks for garbage in what is young, and it is looked for in all memory: once no key came for a
moment, and at last although keys come: what a storm of keys and tokens leaves is 2 MB a second."""
"""After the first screen."""
MAX_MEMORY = 2**16
_TOAST_WIDTH, _TOAST_SHARE = 54, 6
"""Cells of a toast's text, and the part of the screen's height that its lines may take."""
_SCREENS = "vllm_sleep_tui.tui.screens"
_REST = (
    "markdown_it",
    *(f"{_SCREENS}.{name}" for name in ("events", "logs", "gpus", "parameters", "conversations", "duel")),
)
"""What the first answer and the first other screen need."""
_TOLD_CHANGES = 4
"""So many changes of the config fit into a toast."""


class Remembered(msgspec.Struct):
    """What the panel keeps between runs, in `panel.json` of the state folder."""

    theme: str = DEFAULT_THEME


def _commands() -> type[Provider]:
    from vllm_sleep_tui.tui.palette import Commands  # whoever opens the palette pays for it

    return Commands


class PanelApp(App[None]):
    """The panel over a fleet that is open already and outlives it."""

    CSS_PATH = "panel.tcss"
    TITLE = "vllm-sleep-tui"
    ENABLE_COMMAND_PALETTE = True
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_commands}
    _lacks_themes = False

    def __init__(
        self,
        fleet: PanelFleet,
        *,
        state_dir: Path,
        theme_folders: Sequence[Path],
        autostart: Sequence[str] = (),
        conversations: Conversations | None = None,
        post: Post | None = None,
        watch: ConfigWatch | None = None,
        begin: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__()
        self.fleet = fleet
        self.operations = Operations()
        self.conversations = conversations or Conversations(state_dir)
        self.post = post
        """The gateway, open or not."""
        self._watch = watch
        self._begin, self._hint = begin, hint
        self._failures = ToldFailures()
        self._hands = Hands()
        self.is_told_to_leave = False
        """By a signal or the terminal's end, and not by the person."""
        self._memory = state_dir / "panel.json"
        self._autostart = autostart
        remembered = self._recall().theme
        self._files, self._complaints = load_themes(theme_folders, {remembered, DEFAULT_THEME})
        self._register_themes()
        self._lacks_themes = True
        first = remembered if remembered in self._files else DEFAULT_THEME
        self.set_reactive(PanelApp.theme, first)  # which asks for no other one, and tells nobody:
        self.stylesheet.set_variables(self.get_css_variables())
        self.set_class(self.current_theme.dark, "-dark-mode", update=False)
        self.set_class(not self.current_theme.dark, "-light-mode", update=False)
        self.palette = Palette(self._files[first])

    @property
    def available_themes(self) -> dict[str, Theme]:
        """All of them; those that the first screen did without are read now, if they were not yet."""
        if self._lacks_themes:
            self._take_themes(load_themes([package_folder()])[0])
        return super().available_themes

    def get_theme(self, theme_name: str) -> Theme | None:
        """The theme of that name; one that is known needs no others."""
        return super().available_themes.get(theme_name) or self.available_themes.get(theme_name)

    @property
    def theme_names(self) -> tuple[str, ...]:
        """Those that can be chosen: ours, then the person's own."""
        known = self.available_themes
        return tuple(name for name in self._files if name in known)

    def _take_themes(self, ours: dict[str, ThemeFile]) -> None:
        """Know all themes that we ship."""
        self._files = ours | self._files
        self._lacks_themes = False
        self._register_themes()

    def _register_themes(self) -> None:
        for file in self._files.values():
            self.register_theme(textual_theme(file))

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """Literal colours for our own names in the stylesheet, before a theme is chosen."""
        return {"line": "#444444", "quiet": "#888888"}

    def get_line_filters(self) -> Sequence[LineFilter]:
        """The last gate before the terminal: whatever a widget was given, it gets no order of others."""
        return [*super().get_line_filters(), CLEANED]

    def post_message(self, message: Message) -> bool:
        """As every app's; that hands have moved is kept."""
        if isinstance(message, InputEvent):
            self._hands.move()
        return super().post_message(message)

    def _look_for_garbage(self) -> None:
        """Look through all that the panel holds, which takes as long as ten keys, between two of them."""
        if gc.get_count()[2] >= CLEAN_DUE and self._hands.rest_seconds > REST_SECONDS:
            gc.collect()

    def on_mount(self) -> None:
        """Open the dashboard."""
        self.theme_changed_signal.subscribe(self, self._recolor)
        self._recolor(self.current_theme)
        self.dashboard = Dashboard(self.fleet, self.operations, self.conversations, self._hands)
        self.push_screen(self.dashboard)
        self.set_interval(READING_SECONDS, self._keep_reading)
        self.set_interval(READING_SECONDS, self._look_at_config)
        self.set_interval(READING_SECONDS, self._take_back)
        self.set_interval(READING_SECONDS, self._look_for_garbage)
        self.dashboard.call_after_refresh(self.set_timer, REST_SECONDS, self._import_rest)
        for complaint in self._complaints:
            self.notify(complaint, severity="warning", timeout=12, markup=False)
        if self._hint:
            self.notify(self._hint, timeout=20, markup=False)
        if self._begin is not None and not self.dashboard.running_models():
            self.dashboard.call_after_refresh(self.dashboard.start, [self._begin])
        elif self._autostart:
            self.dashboard.call_after_refresh(self.dashboard.ask_autostart, self._autostart)

    def _keep_reading(self) -> None:
        """The course of the GPUs' figures has no gaps where a screen was looked at that shows none."""
        screen = self.screen_stack[-1] if self.screen_stack else None  # none while it ends
        if screen is not None and not (isinstance(screen, LookingScreen) and screen.keeps_readings):
            self.dashboard.readings.see(self.fleet.snapshot())

    @work(exit_on_error=False)
    async def _import_rest(self) -> None:
        """Import and read what the first screen did without, while nobody waits for it."""
        await asyncio.to_thread(_import_rest)
        self._take_themes((await asyncio.to_thread(load_themes, [package_folder()]))[0])
        gc.freeze()  # what was loaded is no garbage to look for, which held up a key for 44 ms
        gc.set_threshold(*gc.get_threshold()[:2], CLEAN_OVERDUE)

    async def _look_at_config(self) -> None:
        """Go on with a config that was changed on disk, and say what is another than before."""
        if self._watch is None or not self._watch.has_changed():
            return
        try:
            loaded = await self._watch.read()
        except PanelError as error:
            words = f"{error.what}\n{error.cure}\nThe old one holds.".replace("\n\n", "\n")
            self.notify(words, title="The config changed", severity="error", timeout=12, markup=False)
            return
        old, new = self.fleet.loaded.config, loaded.config
        found = self.fleet.reload(loaded)
        if self.post is not None and new.gateway is not None:
            await self.post.reload(new.gateway)
            if not self.post.is_started:
                self.post.start()
        elif self.post is not None and old.gateway is not None:
            await self.post.close()
        if found:
            words = "\n".join(change.sentence for change in found[:_TOLD_CHANGES])
            more = len(found) - _TOLD_CHANGES
            words += f"\nand {counted(more, 'more change')}" if more > 0 else ""
            severity: SeverityLevel = (
                "warning" if any(change.needs_care for change in found) else "information"
            )
            self.notify(words, title="The config changed", severity=severity, timeout=12, markup=False)
        self.dashboard.changed()

    def _recolor(self, theme: Theme) -> None:
        if theme.name not in self._files:
            return
        self.palette = Palette(self._files[theme.name])
        for screen in self.screen_stack:
            if isinstance(screen, LookingScreen):
                screen.recolor()

    def _recall(self) -> Remembered:
        try:
            return msgspec.json.decode(read_regular(self._memory, MAX_MEMORY), type=Remembered)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return Remembered()

    def _remember_theme(self, name: str) -> None:
        try:
            files.write_private(self._memory, msgspec.json.encode(Remembered(theme=name)))
        except PanelError as error:
            self.notify(f"The theme is not remembered. {error.what}", severity="warning", markup=False)

    @work
    async def action_theme(self) -> None:
        """Choose a theme, and begin with it the next time."""
        chosen = await self.push_screen_wait(ThemeChooser(self.theme_names, self.theme))
        if chosen is not None:
            self._remember_theme(chosen)

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = True,
    ) -> None:
        """A toast of a few lines: what it covers is looked at too, and all of it stands elsewhere."""
        self._toast(message, title, severity, timeout or self.NOTIFICATION_TIMEOUT, markup=markup)

    def _toast(
        self, message: str, title: str, severity: SeverityLevel, seconds: float, *, markup: bool
    ) -> Notification:
        lines, room = wrap(message, _TOAST_WIDTH), max(2, self.size.height // _TOAST_SHARE)
        if len(lines) > room:
            message = "\n".join([*lines[: room - 1], f"{cut(lines[room - 1], _TOAST_WIDTH - 2)} …"])
        toast = Notification(message, title, severity, seconds, markup=markup)
        self.post_message(Notify(toast))
        return toast

    def on_failure(self, failure: Failure) -> None:
        """A toast that goes before its time once what it tells is over."""
        toast = self._toast(failure.text, failure.title, "error", TOLD_SECONDS, markup=False)
        self._failures.add(toast, failure.is_over)

    def _take_back(self) -> None:
        for toast in self._failures.over():
            self._unnotify(toast)

    def copy_to_clipboard(self, text: str, what: str = "the selection") -> None:
        """Copy a text, and say how far it is known to have come."""
        self._copy(clean(text), what)

    @work
    async def _copy(self, text: str, what: str) -> None:
        arrived = await to_tmux(text)
        if arrived:
            self._clipboard = text
        else:
            super().copy_to_clipboard(text)
        self.notify(words(text, what, arrived=arrived), markup=False)

    def get_driver_class(self) -> type[Driver]:
        """Our own where Textual would take its own for a terminal."""
        usual = super().get_driver_class()
        return PanelDriver if usual is LinuxDriver else usual

    def leave(self) -> None:
        """Begin the end that nobody at the keys asked for."""
        self.is_told_to_leave = True
        self.exit()

    def abandon(self) -> None:
        """In another thread: give the terminal back because the process ends now; says what that cuts off."""
        waiting = self.operations.waiting()
        cut = [
            running.doing for name, running in list(self.operations.running.items()) if name not in waiting
        ]
        words = f"Left while {', '.join(cut)}: whoever comes next carries it on." if cut else "Left."
        words += f" {_dropped(waiting)}" if waiting else ""
        if isinstance(self._driver, PanelDriver):
            self._driver.abandon(words)

    async def action_quit(self) -> None:
        """Ctrl+q asks like q, where a question can be asked."""
        if isinstance(self.screen, Dashboard):
            self.dashboard.action_quit_panel()

    def action_help_quit(self) -> None:
        """Ctrl+c, where it has nothing to copy, asks like q too."""
        if isinstance(self.screen, Dashboard):
            self.dashboard.action_quit_panel()


async def _run(
    loaded: LoadedConfig,
    state_dir: Path,
    agrees: Agrees,
    *,
    read_only: bool,
    begin: str | None,
    hint: str,
) -> int:
    marked = [name for name, model in loaded.config.models.items() if model.autostart and not read_only]
    folders = (package_folder(), paths.config_dir() / "themes")
    watch = ConfigWatch(loaded, agrees)  # first of all: what is written while the fleet opens is a change
    async with Fleet(loaded, state_dir, leads=True, read_only=read_only) as fleet:
        post = Post(fleet, loaded.config.gateway or GatewayConfig())
        if loaded.config.gateway is not None and not read_only:
            post.start()
        app = PanelApp(
            fleet,
            state_dir=state_dir,
            theme_folders=folders,
            autostart=marked,
            conversations=Conversations(state_dir, loaded.path, keeps=loaded.config.keep_conversations),
            post=None if read_only else post,
            watch=watch,
            begin=begin,
            hint=hint,
        )
        loop = asyncio.get_running_loop()
        Leaving(
            lambda: loop.call_soon_threadsafe(app.leave),
            (signal.SIGTERM, signal.SIGHUP),
            terminal=sys.stdin.fileno(),
            last_words=app.abandon,
        )
        try:
            await app.run_async()
        finally:
            if app.is_told_to_leave and (waiting := app.operations.waiting()):
                _say(_dropped(waiting))
            if app.is_told_to_leave and (starts := fleet.own_starts()):
                # To unwind would stop them, minutes of loading; the person did not ask for that.
                _say(f"Left while starting {', '.join(starts)}: whoever comes next carries it on.")
                leave_at_once()
            await app.operations.close()
            app.conversations.close()
            await post.close()
        running = [model.name for model in fleet.snapshot().models if model.state in RUNNING]
        if running:
            _say(f"{', '.join(running)} run on; the panel takes them back when it is opened again.")
    # Without a code it was ended by a stray cancellation, which is no success.
    code = 1 if app.return_code is None else app.return_code
    if app.is_told_to_leave:
        # All is written and given back. What is left is Python's own end, in which no thread keeps the limit.
        leave_at_once(code)
    return code


def _dropped(waiting: Iterable[str]) -> str:
    """What becomes of what had not begun: nobody who comes later would expect it."""
    return f"Dropped, as it still waited for its turn: {', '.join(waiting)}."


def _say(words: str) -> None:
    """Last words, where the screen was; the terminal may be gone."""
    with contextlib.suppress(OSError):
        print(words, file=sys.stderr)  # noqa: T201


def run_panel(
    loaded: LoadedConfig,
    state_dir: Path,
    agrees: Agrees,
    *,
    read_only: bool = False,
    begin: str | None = None,
    hint: str = "",
) -> int:
    """Open the fleet, then the panel over it; servers outlive both. The exit code.

    `begin` is a model to start if no server runs yet, `hint` what to tell first.
    """
    return asyncio.run(_run(loaded, state_dir, agrees, read_only=read_only, begin=begin, hint=hint))


def _import_rest() -> None:
    """The modules; one that cannot be imported is told by whoever needs it."""
    for name in _REST:
        with contextlib.suppress(Exception):  # whatever a half installed module raises
            importlib.import_module(name)
