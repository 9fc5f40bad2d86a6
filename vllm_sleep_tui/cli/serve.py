"""`serve`: the panel's care without its screen, for systemd, tmux or a container."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from vllm_sleep_tui.cli.common import config_option, given_config, is_agreed, load_config
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.states import RUNNING, State
from vllm_sleep_tui.leaving import LIMIT_SECONDS, Leaving, leave_at_once
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.text import clean

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet
    from vllm_sleep_tui.gateway.post import Post

LOOK_SECONDS = 0.5
log = logging.getLogger(__name__)


@click.command()
@click.option("--stop-on-exit", is_flag=True, help="Stop every model when serve ends; otherwise they run on.")
@config_option
@click.pass_context
def serve(ctx: click.Context, stop_on_exit: bool) -> None:
    """Look after the models without a screen.

    It starts those with `autostart`, restarts what dies and sends idle ones to sleep. SIGHUP reads the config
    again; SIGTERM ends it and leaves the servers running, or with --stop-on-exit stops them first.
    """
    loaded = load_config(ctx)
    begin_log()
    named = given_config(ctx) is not None
    asyncio.run(Headless(loaded, is_named=named, stop_on_exit=stop_on_exit).run())


def begin_log() -> None:
    """Our own lines on stdout, each with its time; libraries say only what is wrong.

    A line that cannot be written is lost, and nothing else with it.
    """
    logging.raiseExceptions = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("vllm_sleep_tui").setLevel(logging.INFO)


class CleanFormatter(logging.Formatter):
    """Lines fit for a terminal: reasons and errors hold what servers said."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, cleaned."""
        return clean(super().format(record))


class Headless:
    """One `serve`: its signals, its log, its fleet."""

    def __init__(self, loaded: LoadedConfig, *, is_named: bool, stop_on_exit: bool) -> None:
        self._loaded = loaded
        self._is_named = is_named
        """Whether the config was named, and so agreed to whatever it will say."""
        self._stop_on_exit = stop_on_exit
        self._ends = asyncio.Event()
        self._reloads = asyncio.Event()
        self._logged: dict[str, str] = {}
        self._post: Post | None = None

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        from vllm_sleep_tui.fleet.fleet import Fleet  # which a usage error does without

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._reloads.set)
        Leaving(
            lambda: loop.call_soon_threadsafe(self._ends.set),
            (signal.SIGTERM, signal.SIGINT),
            # To stop servers takes as long as it takes, until somebody asks again.
            limit=None if self._stop_on_exit else LIMIT_SECONDS,
        )
        async with Fleet(self._loaded, state_dir(), leads=True) as fleet:
            log.info("serve: pid %d, config %s", os.getpid(), self._loaded.path)
            starting = asyncio.create_task(self._autostart(fleet))
            await self._take_post(fleet)
            try:
                await self._watch(fleet)
                if self._stop_on_exit:
                    # A restart, or a request, would start what is being stopped.
                    await fleet.resign()
                    await self._leave_post()
                    await self._drop(starting)
                    await self._stop_all(fleet)
                elif not starting.done() or (self._post is not None and self._post.is_switching):
                    # Unwinding would break the start off; left as it is, whoever comes next carries it on.
                    log.info("serve: ends; what is under way is carried on by the next serve or panel")
                    leave_at_once()
            finally:
                await self._drop(starting)
                await self._leave_post()
        log.info("serve: ended%s", "" if self._stop_on_exit else ", the servers run on")

    async def _watch(self, fleet: Fleet) -> None:
        """Tell what changes and reload on request, until the end is asked for."""
        led = None
        while not self._ends.is_set():
            if self._reloads.is_set():
                self._reloads.clear()
                self._reload(fleet)
                await self._take_post(fleet)
            if fleet.is_leader != led:
                led = fleet.is_leader
                log.info("serve: leads" if led else "serve: another panel or serve leads, waiting")
            self._tell(fleet)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ends.wait(), LOOK_SECONDS)

    async def _leave_post(self) -> None:
        """Close the gateway, if there is one."""
        if self._post is not None:
            await self._post.close()
            self._post = None

    async def _take_post(self, fleet: Fleet) -> None:
        """Open the gateway that the config asks for, change it, or close it."""
        wanted = self._loaded.config.gateway
        if self._post is not None and wanted is not None:
            await self._post.reload(wanted)
        elif self._post is not None:
            await self._leave_post()
        elif wanted is not None:
            from vllm_sleep_tui.gateway.post import Post  # with an HTTP server, for who has a gateway

            self._post = Post(fleet, wanted)
            self._post.start()

    def _tell(self, fleet: Fleet) -> None:
        """One line for each model whose state is another than before."""
        snapshot = fleet.snapshot()
        for model in snapshot.models:
            line = line_of(model)
            if self._logged.get(model.name) != line:
                self._logged[model.name] = line
                log.info("%s: %s", model.name, line)
        for note in snapshot.notes:
            if self._logged.get(note) is None:
                self._logged[note] = note
                log.warning("%s", note)

    async def _autostart(self, fleet: Fleet) -> None:
        """Start the models that the config wants and that do not run."""
        stopped = {model.name for model in fleet.snapshot().models if model.state not in RUNNING}
        wanted = self._loaded.config.models.items()
        names = [name for name, model in wanted if model.autostart and name in stopped]
        if names:
            log.info("autostart: %s", ", ".join(names))
            try:
                await fleet.start(names)
            except PanelError as error:
                log.error("autostart: %s %s", error.what, error.cure)
            except Exception:  # what it dies of must not keep serve from its other work, nor from its end
                log.exception("autostart: something unforeseen went wrong")

    async def _drop(self, starting: asyncio.Task[None]) -> None:
        """Begin none of the autostarts that wait; one under way ends at its next safe point."""
        if not starting.done():
            log.info("autostart: what is not started yet is dropped")
            starting.cancel()
        with contextlib.suppress(PanelError, asyncio.CancelledError):
            await starting

    async def _stop_all(self, fleet: Fleet) -> None:
        """Stop what runs; a start that somebody else has under way is theirs to stop."""
        theirs = fleet.starts_of_others()
        for name, pid in theirs.items():
            log.info("serve: %s is being started by process %d and is left to it", name, pid)
        running = [name for name in fleet.snapshot().with_servers() if name not in theirs]
        log.info("serve: stopping %s", ", ".join(running) or "nothing")
        if not running:
            return
        try:
            await fleet.stop(running)
        except PanelError as error:
            log.error("serve: %s %s", error.what, error.cure)

    def _reload(self, fleet: Fleet) -> None:
        """Read the config again; what runs is left alone, and what that means is said."""
        try:
            loaded = load(self._loaded.found)
        except PanelError as error:
            log.error("reload: %s %s The old config holds.", error.what, error.cure)
            return
        if not self._is_named and not is_agreed(loaded):
            log.error("reload: %s was found, not named, and has changed. The old config holds.", loaded.found)
            return
        for change in fleet.reload(loaded):
            log.log(logging.WARNING if change.needs_care else logging.INFO, "reload: %s", change.sentence)
        self._loaded = loaded
        log.info("reload: done, %d models", len(loaded.config.models))


def line_of(model: ModelSnapshot) -> str:
    """The state of a model in words, with the reason of a failure."""
    level = f" L{model.level}" if model.state is State.ASLEEP and model.level is not None else ""
    reason = f": {model.reason}" if model.state is State.FAILED and model.reason else ""
    port = f", port {model.port}" if model.state is State.AWAKE else ""
    return f"{model.state}{level}{port}{reason}"
