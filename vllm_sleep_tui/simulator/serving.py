"""The API server once its engine is ready: uvicorn, signals, and the watch over the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import uvicorn

from vllm_sleep_tui.simulator import logs
from vllm_sleep_tui.simulator.app import Application, wrap
from vllm_sleep_tui.simulator.arguments import Options
from vllm_sleep_tui.simulator.behaviours import Fault, Faults
from vllm_sleep_tui.simulator.client import DEAD, EngineClient
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.metrics import Metrics
from vllm_sleep_tui.simulator.server_state import ServerState
from vllm_sleep_tui.simulator.settings import Settings

WATCHDOG_SECONDS = 1.5
"""From the engine's death to the end of the API server; 1 to 2.5 s on the real one."""
KEEP_ALIVE_SECONDS = 5


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end the process by the signal and not with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `_Serving`."""
        yield


def serve(
    *,
    options: Options,
    settings: Settings,
    faults: Faults,
    listener: socket.socket,
    engine_pid: int,
    engine: socket.socket,
    ready: Mapping[str, Any],
) -> int:
    """Answer requests until a signal or the engine's death; the exit code is 0 for both."""
    metrics = Metrics(
        name=options.served_names[0],
        minor=settings.minor,
        kv_tokens=ready["kv_tokens"],
        utilization=options.utilization,
        log_stats=options.log_stats,
    )
    state = ServerState(
        options=options,
        settings=settings,
        engine=EngineClient(engine),
        metrics=metrics,
        faults=faults,
        log=Log("APIServer"),
        world_size=ready["world"],
    )
    asyncio.run(_Serving(state, listener, engine_pid).run())
    return 0


class _Serving:
    """One server's time on the air."""

    def __init__(self, state: ServerState, listener: socket.socket, engine_pid: int) -> None:
        self._state = state
        self._listener = listener
        self._engine_pid = engine_pid
        self._stopping = False
        self._stopped = asyncio.Event()
        application = Application(state)
        keys = state.options.api_keys or tuple(filter(None, (state.settings.api_key,)))
        app = wrap(application, keys=keys, middlewares=state.options.middlewares)
        self._announce(application)
        config = uvicorn.Config(
            app,
            log_config=_log_config(state),
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            http="h11",
            ws="none",
            loop="asyncio",
        )
        self._server = _Server(config)

    async def run(self) -> None:
        """Serve, unless another server took the port meanwhile: then say ready and never listen."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_signal_handler(signal.SIGINT, self._stop)
        carrying = asyncio.create_task(self._state.engine.run())
        watching = asyncio.create_task(self._watch())
        try:
            await self._server.serve(sockets=[self._listener])
        except OSError:
            # uvloop swallows the error of listen(): the race's loser says ready, and nobody can reach it.
            await self._stopped.wait()
            await self._server.lifespan.shutdown()
        self._kill_engine()
        for task in (carrying, watching):
            task.cancel()
        await asyncio.wait({carrying, watching})

    async def _watch(self) -> None:
        await self._state.engine.dead.wait()
        # Logged on a clean stop too, as the real one does (log-sigterm-while-streaming.txt).
        error = f"vllm.v1.engine.exceptions.EngineDeadError: {DEAD}"
        self._state.log.error("async_llm.py:906", f"AsyncLLM output_handler failed.\n{error}")
        if self._stopping or self._state.settings.keep_alive:
            return
        if not self._state.settings.instant:
            await asyncio.sleep(WATCHDOG_SECONDS / self._state.settings.speed)
        self._stopping = True
        self._stopped.set()
        self._server.should_exit = True

    def _stop(self) -> None:
        if self._stopping or self._state.faults.has(Fault.SIGTERM_IGNORED):
            return
        self._stopping = True
        self._state.log.info("launcher.py:254", "[shutdown] API server: shutdown triggered")
        if not self._state.faults.has(Fault.SIGTERM_WAITS_FOR_CLIENT):
            self._state.engine.abort_all_here()
        else:
            self._state.engine.go_silent()
        self._kill_engine()
        self._stopped.set()
        self._server.should_exit = True

    def _kill_engine(self) -> None:
        # vLLM sends SIGTERM and at once SIGKILL; the workers end with their engine.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._engine_pid, signal.SIGKILL)
            os.waitpid(self._engine_pid, 0)

    def _announce(self, application: Application) -> None:
        log, options = self._state.log, self._state.options
        log.info(
            "entry.py:136",
            "Supported tasks: ['embed']" if options.pooling else "Supported tasks: ['generate']",
        )
        if self._state.settings.dev_mode:
            warning = (
                "SECURITY WARNING: Development endpoints are enabled! This should NOT be used in production!"
            )
            log.warning("__init__.py:44", warning)
        address = f"unix:{options.uds}" if options.uds else f"http://{options.host}:{options.port}"
        log.info("entry.py:140", f"Starting vLLM server on {address}")
        log.info("launcher.py:186", "Available routes are:")
        for method, path in application.routes:
            log.info("launcher.py:195", f"Route: {path}, Methods: {method}")


class _Unlogged(logging.Filter):
    """Drops the access lines of paths that ``--disable-access-log-for-endpoints`` names."""

    def __init__(self, paths: frozenset[str]) -> None:
        super().__init__()
        self._paths = paths

    def filter(self, record: logging.LogRecord) -> bool:
        """An access record's arguments are client, method, path with query, version, status."""
        path = record.args[2] if isinstance(record.args, tuple) and len(record.args) == 5 else ""
        return str(path).partition("?")[0] not in self._paths


class _NoAddress(logging.Filter):
    """Drops uvicorn's "running on" line, which vLLM does not print."""

    def filter(self, record: logging.LogRecord) -> bool:
        """By its text."""
        return not record.getMessage().startswith("Uvicorn running on")


class _Stdout(logging.Handler):
    """Writes lines as uvicorn's default formatter does, with vLLM's prefix up to 0.24."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """One write a record."""
        text = record.getMessage()
        if record.name == "uvicorn.access" and isinstance(record.args, tuple):
            client, method, path, version, status = record.args
            text = f'{client} - "{method} {path} HTTP/{version}" {status} {_phrase(int(str(status)))}'
        if record.exc_info:
            text = f"{text}\n{logging.Formatter().formatException(record.exc_info)}"
        logs.raw(f"{self._prefix}{record.levelname + ':':<9} {text}")


def _phrase(status: int) -> str:
    from http import HTTPStatus

    return HTTPStatus(status).phrase


def _log_config(state: ServerState) -> dict[str, Any]:
    prefix = f"(APIServer pid={os.getpid()}) " if state.settings.minor <= 24 else ""
    handler = {"()": _Stdout, "prefix": prefix}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {
            "unlogged": {"()": _Unlogged, "paths": state.options.unlogged_paths},
            "no_address": {"()": _NoAddress},
        },
        "handlers": {
            "error": {**handler, "filters": ["no_address"]},
            "access": {**handler, "filters": ["unlogged"]},
        },
        "loggers": {
            "uvicorn": {"level": "INFO"},
            "uvicorn.error": {"handlers": ["error"], "level": "INFO", "propagate": False},
            "uvicorn.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
        },
    }
