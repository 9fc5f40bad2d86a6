"""Getting a model into the Hugging Face cache before a GPU is locked for its start.

It is done by `hf` (older: `huggingface-cli`) of the environment that holds vLLM, so that the cache, its
locks and its credentials are vLLM's own. Without it, or offline, vLLM gets the model or says what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from vllm_sleep_tui.engine.causes import diagnose
from vllm_sleep_tui.engine.logs import strip_escapes
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.checkpoint import find_checkpoint
from vllm_sleep_tui.fleet.core import GIB, Core
from vllm_sleep_tui.fleet.discovery import hub_cache
from vllm_sleep_tui.fleet.operation import Operation
from vllm_sleep_tui.fleet.states import StartPhase

TOOLS = ("hf", "huggingface-cli")
POLL_SECONDS = 0.5
ENDING_SECONDS = 5.0
SPOKEN_BYTES = 64 * 1024


async def fetch(core: Core, name: str, operation: Operation) -> None:
    """Download the model if it is a hub name that the cache does not hold.

    Raises OperationError with the cause if the download failed, CancelledByUser if it was cancelled; what
    was loaded stays in the cache and is not loaded again.
    """
    model = core.model(name)
    environ = {**os.environ, **model.env}
    tool = downloader(core, environ)
    if model.model is None or tool is None or not is_missing(core, model.model, environ):
        return
    process = await asyncio.create_subprocess_exec(
        tool,
        "download",
        model.model,
        env=environ,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    words = asyncio.ensure_future(last_words(process))
    folder = hub_cache(environ) / f"models--{model.model.replace('/', '--')}"
    try:
        await follow(process, folder, name, operation)
    except BaseException:
        await end(process)
        raise
    finally:
        said = await words
    if process.returncode:
        found = diagnose(said, exit_code=process.returncode)
        raise OperationError(f"{name}: {model.model} could not be fetched: {found.reason}", found.cure)


def downloader(core: Core, environ: Mapping[str, str]) -> str | None:
    """The download tool beside the vLLM binary; None offline, in the demo, or if there is none."""
    offline = environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    program = shutil.which(core.config.vllm_command[0], path=environ.get("PATH"))
    if offline or core.simulated is not None or program is None:
        return None
    folders = dict.fromkeys([Path(program).parent, Path(program).resolve().parent])
    places = [folder / tool for folder in folders for tool in TOOLS]
    return next((str(place) for place in places if os.access(place, os.X_OK)), None)


def is_missing(core: Core, model: str, environ: Mapping[str, str]) -> bool:
    """Whether it is a hub name and the cache holds no complete copy of it."""
    is_hub_name = model.count("/") == 1 and not model.startswith((".", "/", "~"))
    if not is_hub_name or find_checkpoint(model, core.loaded.path.parent, environ) is None:
        return is_hub_name
    folder = hub_cache(environ) / f"models--{model.replace('/', '--')}"
    return any(folder.glob("blobs/*.incomplete"))


async def follow(process: asyncio.subprocess.Process, folder: Path, name: str, operation: Operation) -> None:
    """Tell how much has come and how fast until the download ends."""
    began, had = time.monotonic(), await asyncio.to_thread(size_of, folder)
    while process.returncode is None:
        have = await asyncio.to_thread(size_of, folder)
        speed = (have - had) / max(0.1, time.monotonic() - began)
        operation.tell(name, StartPhase.FETCHING, f"{have / GIB:.2f} GiB, {speed / 2**20:.0f} MiB/s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), POLL_SECONDS)
        operation.checkpoint()


def size_of(folder: Path) -> int:
    """Bytes that have arrived; files may come and go meanwhile."""
    total = 0
    for path in folder.glob("blobs/*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size
    return total


async def last_words(process: asyncio.subprocess.Process) -> str:
    """The end of what the tool said, read as it comes so that it never blocks on a full pipe."""
    assert process.stderr is not None
    said = b""
    while part := await process.stderr.read(4096):
        said = (said + part)[-SPOKEN_BYTES:]
    return strip_escapes(said.decode(errors="replace"))


async def end(process: asyncio.subprocess.Process) -> None:
    """End the download's group, kindly first; it goes on where it was the next time."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), ENDING_SECONDS)
