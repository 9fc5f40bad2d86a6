"""The API server process: from `vllm serve` on the command line to its exit code."""

from __future__ import annotations

import functools
import os
import signal
import socket
from types import FrameType
from typing import Any

from vllm_sleep_tui.simulator import failures, logs
from vllm_sleep_tui.simulator.arguments import Options
from vllm_sleep_tui.simulator.behaviours import Faults
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.processes import Channel, spawn, wait_for_ever
from vllm_sleep_tui.simulator.profiles import START_SECONDS, architecture
from vllm_sleep_tui.simulator.settings import Settings
from vllm_sleep_tui.simulator.startup import TITLE, run_engine

LOGO = """
       █     █     █▄   ▄█
 ▄▄ ▄█ █     █     █ ▀▄▀ █  version {version}
  █▄█▀ █     █     █     █  model   {model}
   ▀▀  ▀▀▀▀▀ ▀▀▀▀▀ ▀     ▀
"""
FAILED_EXIT_SECONDS = 3.0
"""How long a failed server lives after its traceback."""


class ApiServer:
    """One run of `vllm serve`."""

    def __init__(self, options: Options, settings: Settings) -> None:
        self._options = options
        self._settings = settings
        self._faults = Faults(settings.faults)
        self._log = Log("APIServer")
        self._interrupts = 0
        self._engine_pid = 0

    def run(self) -> int:
        """Serve until told to stop; the exit code."""
        self._settings.wait(START_SECONDS["import"])
        self._log.info(
            "api_utils.py:347", LOGO.format(version=self._settings.version, model=self._options.model)
        )
        self._log.info("api_utils.py:286", f"non-default args: {dict(self._options.given)}")
        try:
            listener = self._bind()
            failures.check_configuration(self._options, self._settings, self._faults)
        except (OSError, failures.StartFailed) as error:
            known = isinstance(error, failures.StartFailed)
            return self._fail(str(error) if known else f"OSError: {error}")
        self._configure()
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.signal(signal.SIGINT, self._interrupt)
        body = functools.partial(
            run_engine, options=self._options, settings=self._settings, names=self._settings.faults
        )
        self._engine_pid, channel = spawn(TITLE, body, close=(listener,))
        # Imported while the engine starts: it is most of the API server's own start.
        from vllm_sleep_tui.simulator.serving import serve

        ready = self._wait_for_engine(channel)
        if ready is None:
            return self._fail(failures.ENGINE_FAILED)
        self._settings.wait(START_SECONDS["serve"])
        return serve(
            options=self._options,
            settings=self._settings,
            faults=self._faults,
            listener=listener,
            engine_pid=self._engine_pid,
            engine=channel.socket,
            ready=ready,
        )

    def _bind(self) -> socket.socket:
        # Bound now and listening only when ready: until then a connection is refused, and a second server
        # that starts meanwhile binds the same port without an error (log-port-race-loser-deaf.txt).
        if self._options.uds:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(self._options.uds)
            return listener
        # With its protocol named, or asyncio leaves Nagle's delay on: 44 ms for each answer.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self._options.host, self._options.port))
        return listener

    def _configure(self) -> None:
        self._log.info("model.py:733", f"Resolved architecture: {architecture(self._options.model)}")
        self._log.info("model.py:2152", f"Using max model len {self._options.max_model_len}")
        self._settings.wait(START_SECONDS["configure"])

    def _wait_for_engine(self, channel: Channel) -> dict[str, Any] | None:
        messages = channel.receive()
        if messages is not None:
            ready: dict[str, Any] = messages[0]["ready"]
            return ready
        if self._interrupts:
            # Its engine gone and its own signal lost, the parent waits for an engine that will not come.
            wait_for_ever()
        return None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if number == signal.SIGTERM and self._interrupts == 1:
            return  # swallowed (log-sigterm-twice-during-startup.txt)
        if self._engine_pid:
            os.kill(self._engine_pid, signal.SIGKILL)
        if number == signal.SIGINT:
            logs.raw(f"{failures.TRACEBACK}\n{failures.ENGINE_FAILED}", descriptor=2)
            os._exit(1)
        logs.raw(f"{failures.TRACEBACK}\nKeyboardInterrupt: terminated", descriptor=2)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)

    def _fail(self, cause: str) -> int:
        logs.raw(f"{failures.TRACEBACK}\n{cause}", descriptor=2)
        self._settings.wait(FAILED_EXIT_SECONDS)
        return 1
