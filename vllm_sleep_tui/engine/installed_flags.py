"""The flags of the vLLM that is installed: its own parser is asked, once per binary, and its word is kept.

Its Python is asked for the parser itself. Where that is not to be found, behind a wrapper, the command is
asked for its `serve --help=all`, which says less. Either imports vLLM, which takes 10 to 30 s without a GPU
being touched; so only a start, `doctor` and `init --schema` ask, and whoever only wants to know looks at what
is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from vllm_sleep_tui.config.flags import MAX_TABLE_BYTES, FlagTable, decode_table, encode_table, shipped_table
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.engine.help_text import WIDTH, flags_in
from vllm_sleep_tui.engine.versions import release_of
from vllm_sleep_tui.files import private_dir, read_regular, write_private

DUMPER = Path(__file__).with_name("dump_parser.py")
ASK_SECONDS = 240.0
"""Importing vLLM took 27 s on two busy cores, over 120 s on two with twenty times their work (0.32, CPU)."""
SHEBANG_BYTES = 4096
"""More than the kernel reads of a script's first line; of a large binary no more is read."""
WRAPPED_SECONDS = 86_400.0
"""How long a wrapper's word is kept: the vLLM behind it may be another without any file changing here."""
UNKNOWN_VERSION = "of a version that it does not tell"
LEFT_OUT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""Of this program's own Python, not of vLLM's."""


class Installed(msgspec.Struct, frozen=True):
    """A vllm binary, and how to ask it."""

    program: Path
    python: Path | None
    """The Python that runs it; None if it is no Python script, such as a wrapper."""
    version: str | None
    """As the metadata beside it says."""
    more: tuple[str, ...] = ()
    """The words of the command after the program."""
    folder: Path = Path("/")
    """Where it is started, as a wrapper may count from there."""

    @property
    def key(self) -> str:
        """Names this binary in this state: another version or a new installation has another."""
        words = [self.folder / word for word in self.more if "/" in word]
        changed = [path.stat().st_mtime_ns for path in (self.program, DUMPER, *words) if path.exists()]
        state = (str(self.program.resolve()), str(self.python), self.version, changed, self.more)
        return hashlib.sha256(repr(state).encode()).hexdigest()[:24]


def installed(
    command: Sequence[str], version: str | None, environ: Mapping[str, str], folder: Path
) -> Installed | None:
    """The binary of a `vllm_command` that is run in `folder`; None if it is not there."""
    path = shutil.which(command[0], path=environ.get("PATH"))
    if path is None:
        return None
    program = Path(path)
    is_python = re.fullmatch(r"python[0-9.]*", program.name) is not None
    python = program if is_python else _interpreter(program)
    return Installed(program, python, version, tuple(command[1:]), folder)


def _interpreter(program: Path) -> Path | None:
    """The Python that a script names in its first lines, as pip and uv write them; None if it is none."""
    try:
        with program.open("rb") as file:
            head = file.read(SHEBANG_BYTES).decode(errors="replace")
    except OSError:
        return None
    first, _, rest = head.partition("\n")
    if not first.startswith("#!"):
        return None
    words = first[2:].split()
    if words[:1] == ["/bin/sh"]:  # a path that is too long or has spaces: '''exec' "…/python" "$0" "$@"
        match = re.match(r"'''exec' (\"[^\"]+\"|\S+) ", rest)
        words = [match[1].strip('"')] if match else []
    elif words and Path(words[0]).name == "env":
        return None  # whichever Python is first in PATH by then
    if not words or not re.match(r"python", Path(words[0]).name):
        return None
    return Path(words[0])


def kept_flags(vllm: Installed | None, state_dir: Path) -> FlagTable:
    """The flags of this binary as kept, else of the shipped version that is nearest; runs nothing."""
    if vllm is not None:
        with contextlib.suppress(OSError, *NOT_JSON):
            path = _kept(vllm, state_dir)
            table = decode_table(read_regular(path, MAX_TABLE_BYTES), is_asked=True)
            if vllm.python is not None or time.time() - path.stat().st_mtime < WRAPPED_SECONDS:
                return table
    return shipped_table(vllm.version if vllm else None)


async def ask_flags(vllm: Installed | None, state_dir: Path, environ: Mapping[str, str]) -> FlagTable:
    """The same, after asking the installed vLLM if that was not done yet; the answer is kept.

    A vLLM that cannot be asked, or gives no answer within ASK_SECONDS, has the shipped table. Raises
    OperationError if the folder for the answer cannot be made.
    """
    table = kept_flags(vllm, state_dir)
    if table.is_asked or vllm is None:
        return table
    content = await _ask_parser(vllm, environ) or await _ask_help(vllm, environ)
    if content is None:
        return table
    path = _kept(vllm, state_dir)
    await asyncio.to_thread(private_dir, path.parent)
    await asyncio.to_thread(write_private, path, content)
    return decode_table(content, is_asked=True)


def _kept(vllm: Installed, state_dir: Path) -> Path:
    return state_dir / "flags" / f"{vllm.key}.json"


async def _ask_parser(vllm: Installed, environ: Mapping[str, str]) -> bytes | None:
    """The table of vLLM's parser, from its own Python; None if that is not known or does not answer."""
    if vllm.python is None:
        return None
    content = await _said(environ, Path("/"), str(vllm.python), str(DUMPER))
    try:
        return content if content and decode_table(content, is_asked=True).flags else None
    except NOT_JSON:
        return None


async def _ask_help(vllm: Installed, environ: Mapping[str, str]) -> bytes | None:
    """The table of what `serve --help=all` shows; None if the command shows no such thing."""
    command = (str(vllm.program), *vllm.more)
    shown = await _said(environ, vllm.folder, *command, "serve", "--help=all")
    if not shown:
        return None
    version = vllm.version
    if version is None:
        said = await _said(environ, vllm.folder, *command, "--version")
        told = re.search(rb"\d+\.\d+\.\d+[\w.+-]*", said or b"")
        version = told[0].decode() if told else None
    near = shipped_table(version)
    is_same = version is not None and release_of(version) == release_of(near.version)
    flags = flags_in(shown.decode(errors="replace"), near, same_release=is_same)
    return encode_table(version or UNKNOWN_VERSION, flags) if flags else None


async def _said(environ: Mapping[str, str], folder: Path, *command: str) -> bytes | None:
    """What a command prints; None if it fails or is too slow. Its whole group is ended then."""
    environment = {name: value for name, value in environ.items() if name not in LEFT_OUT}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "NO_COLOR": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"COLUMNS": str(WIDTH)}
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            start_new_session=True,
            limit=MAX_TABLE_BYTES,
        )
    except OSError:
        return None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(ASK_SECONDS):
            content = b""
            while part := await process.stdout.read(MAX_TABLE_BYTES):
                content += part
                if len(content) > MAX_TABLE_BYTES:
                    return None
            await process.wait()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:  # afterwards its number may be another's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    return content if process.returncode == 0 else None
