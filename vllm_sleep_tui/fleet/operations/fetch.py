"""Getting a model's weights into the Hugging Face cache before a GPU is locked for its start.

Only what is plain is got beforehand: a hub name that vLLM would download itself, file for file as it would,
by `hf` (older: `huggingface-cli`) of the environment that holds vLLM, so that the cache, its locks and its
credentials are vLLM's own. All else, and whatever fails here, is vLLM's to get, in its own words.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

import msgspec

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.causes import diagnose_download
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.states import StartPhase
from vllm_sleep_tui.sizing.hub import hub_cache
from vllm_sleep_tui.sizing.model_files import REF_LIMIT, is_weights_name, read_config, read_whole
from vllm_sleep_tui.telemetry.processes import (
    ProcessId,
    ProcessTable,
    environment_has,
    is_alive,
    signal_process,
)
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.units import GIB

TOOLS = ("hf", "huggingface-cli")
POLL_SECONDS = 0.5
ENDING_SECONDS = 5.0
MARK_VARIABLE = "VLLM_SLEEP_TUI_DOWNLOAD"
"""Of the tool's environment: names the download."""
SPOKEN_BYTES = 64 * 1024
INDEX_BYTES = 64 * 2**20
INDEX = "model.safetensors.index.json"
"""Where it is there, it alone says which safetensors are loaded."""
IGNORED = ("original/**/*",)
"""vLLM's own `--ignore-patterns`."""
PATTERNS: Mapping[str, tuple[str, ...]] = {
    "auto": ("consolidated*.safetensors", INDEX, "*.safetensors", "*.bin", "*.pt"),
    "hf": (INDEX, "*.safetensors", "*.bin", "*.pt"),
    "safetensors": (INDEX, "*.safetensors"),
    "fastsafetensors": (INDEX, "*.safetensors"),
    "instanttensor": (INDEX, "*.safetensors"),
    "mistral": ("consolidated*.safetensors",),
    "npcache": ("*.bin", "*.pt"),
    "pt": ("*.pt",),
}
"""What vLLM's default loader looks for, by load format; the first that there is (source, 0.24 to 0.32)."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = ("1", "true", "yes", "on")


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The weights that vLLM would download, and where it would put them."""

    name: str
    revision: str | None
    patterns: tuple[str, ...]
    ignored: tuple[str, ...]
    cache: Path
    given_cache: bool
    """`download-dir` is set; the cache is the environment's otherwise."""

    @property
    def folder(self) -> Path:
        """The model's folder in the cache."""
        return self.cache / f"models--{self.name.replace('/', '--')}"

    def snapshot(self) -> Path | None:
        """The folder of the revision's files; None if nothing of it has come."""
        commit = self.revision or "main"
        if not _COMMIT.fullmatch(commit):
            try:
                commit = read_whole(self.folder / "refs" / commit, REF_LIMIT).decode().strip()
            except (UsageError, UnicodeDecodeError):
                return None
        return self.folder / "snapshots" / commit

    def files(self, pattern: str) -> list[str]:
        """The files of the snapshot that match, as the hub matches them: in its folders as well."""
        root = self.snapshot()
        if root is None:
            return []
        names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        kept = (name for name in names if not any(fnmatch(name, one) for one in self.ignored))
        return [name for name in kept if fnmatch(name, pattern)]

    def indexed(self) -> list[str] | None:
        """The files that the index names; None without an index that can be read."""
        root = self.snapshot()
        if root is None:
            return None
        try:
            found = read_config(root / INDEX, INDEX_BYTES)["weight_map"].values()
            return sorted({name for name in found if isinstance(name, str) and is_weights_name(name)}) or None
        except (UsageError, KeyError, TypeError, AttributeError):
            return None

    def is_here(self) -> bool:
        """Whether the cache holds all that vLLM would load."""
        if any(self.folder.glob("blobs/*.incomplete")):
            return False
        for pattern in self.patterns:
            if pattern == INDEX and (names := self.indexed()):
                root = self.snapshot()
                return root is not None and all((root / name).exists() for name in names)
            if pattern != INDEX and self.files(pattern):
                return True
        return False


async def fetch(model: Model, operation: Operation) -> None:
    """Download the model's weights if vLLM would and the cache does not hold them.

    A download that fails is told and left to vLLM. Raises CancelledByUser if it was cancelled; what was
    loaded stays in the cache and is not loaded again.
    """
    environ = {**os.environ, **model.config.env}
    base = model.core.loaded.path.resolve().parent
    tool, wanted = downloader(model, environ), wanted_of(model.config, base, environ)
    if tool is None or wanted is None or await asyncio.to_thread(wanted.is_here):
        return
    for pattern in wanted.patterns:
        failed = await download(tool, wanted, pattern, base, environ, model.name, operation)
        if failed is None and pattern == INDEX and (names := wanted.indexed()):
            failed = await download(tool, wanted, names, base, environ, model.name, operation)
            if failed is None:
                return
        if failed is not None:
            operation.tell(model.name, "not fetched", f"{failed} vLLM tries it itself.")
            return
        if pattern != INDEX and wanted.files(pattern):
            return


def wanted_of(model: ModelConfig, base: Path, environ: Mapping[str, str]) -> Wanted | None:
    """What vLLM would download of the model; None if that is not for us to say. `base`: the config's folder.

    ModelScope, object stores, GGUF files of a repository, folders and loaders that stream are vLLM's own.
    """
    source = model.model or ""
    args = ServeArgs(model.args)
    if (
        environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in _TRUE
        or not _HUB_NAME.fullmatch(source)
        or source.lower().endswith(".gguf")
        or (base / source).is_dir()
        or args.load_format not in PATTERNS
    ):
        return None
    return Wanted(
        name=source,
        revision=args.revision,
        patterns=PATTERNS[args.load_format],
        ignored=args.ignore_patterns or IGNORED,
        cache=base / Path(args.download_dir).expanduser() if args.download_dir else base / hub_cache(environ),
        given_cache=args.download_dir is not None,
    )


def downloader(model: Model, environ: Mapping[str, str]) -> str | None:
    """The download tool beside the vLLM binary; None offline, in the demo, or if there is none."""
    offline = any(
        environ.get(key, "").strip().lower() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )
    program = shutil.which(model.vllm_command[0], path=environ.get("PATH"))
    if offline or model.core.simulated is not None or program is None:
        return None
    folders = dict.fromkeys([Path(program).parent, Path(program).resolve().parent])
    places = [folder / tool for folder in folders for tool in TOOLS]
    return next((str(place) for place in places if os.access(place, os.X_OK)), None)


async def download(
    tool: str,
    wanted: Wanted,
    what: str | Sequence[str],
    base: Path,
    environ: Mapping[str, str],
    name: str,
    operation: Operation,
) -> str | None:
    """Have the tool get the files that match a pattern, or those named; None if it did, else its reason."""
    words = [tool, "download", wanted.name]
    if isinstance(what, str):
        words += ["--include", what]
        words += [word for one in wanted.ignored for word in ("--exclude", one)]
    else:
        words += what
    words += ["--revision", wanted.revision] if wanted.revision else []
    words += ["--cache-dir", str(wanted.cache)] if wanted.given_cache else []
    mark = secrets.token_hex(16)
    try:
        # A file and no pipe: whoever the tool leaves behind may keep it open for ever.
        with tempfile.TemporaryFile() as said:
            process = await asyncio.create_subprocess_exec(
                *words,
                env={**environ, MARK_VARIABLE: mark},
                cwd=base,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
            try:
                await follow(process, wanted.folder, name, operation)
            except BaseException:
                await end(mark)
                raise
            return diagnose_download(last_words(said)) if process.returncode else None
    except OSError as error:
        return f"{tool} could not be run: {error.strerror}."


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


def last_words(said: IO[bytes]) -> str:
    """The end of what the tool said."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - SPOKEN_BYTES))
    return clean(said.read(SPOKEN_BYTES).decode(errors="replace"))


async def end(mark: str) -> None:
    """End the download, kindly first, and all that it began, whether it lives itself or not.

    They are told by the mark in their environment, wherever they went. It goes on where it was the next time.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + ENDING_SECONDS
        for process in await asyncio.to_thread(marked, mark):
            signal_process(process, number)
        while await asyncio.to_thread(marked, mark):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.05)
        else:
            return


def marked(mark: str) -> list[ProcessId]:
    """The living processes of a download."""
    table = ProcessTable.read()
    found = [table.id_of(pid) for pid in table.parents if environment_has(pid, MARK_VARIABLE, mark)]
    return [process for process in found if process is not None and is_alive(process)]
