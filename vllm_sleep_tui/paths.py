"""Where files live, and which config files the person has agreed to run commands from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import msgspec
import platformdirs

from vllm_sleep_tui.config import CONFIG_NAME
from vllm_sleep_tui.errors import OperationError, UsageError

APP = "vllm-sleep-tui"


def config_dir() -> Path:
    """The user's config folder (XDG_CONFIG_HOME is honoured); it need not exist."""
    return platformdirs.user_config_path(APP)


def state_dir() -> Path:
    """The user's state folder (XDG_STATE_HOME is honoured), private; raises OperationError."""
    return private_dir(platformdirs.user_state_path(APP))


def private_dir(folder: Path) -> Path:
    """Make a folder that only this user can read; raises OperationError if that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OperationError(
            f"The folder {folder} cannot be made: {error.strerror}.",
            "Make it writable, or name another with XDG_STATE_HOME.",
        ) from None
    return folder


def find_config(explicit: Path | None) -> Path:
    """The given config file, else the current folder's, else the user's; raises UsageError if none."""
    if explicit is not None:
        if explicit.is_file():
            return explicit
        if explicit.is_dir():
            raise UsageError(f"{explicit}: a folder, not a file", f"Name the file: {explicit / CONFIG_NAME}")
        raise UsageError(
            f"{explicit}: no such file", f"Write one with: {APP} init, or look at the demo: {APP} demo"
        )
    for candidate in (Path(CONFIG_NAME), config_dir() / CONFIG_NAME):
        if candidate.is_file():
            return candidate
    raise UsageError(
        f"No {CONFIG_NAME} here nor in {config_dir()}.",
        f"Write one with: {APP} init, or look at the demo: {APP} demo",
    )


def trusted(path: Path, digest: str, state: Path) -> bool:
    """Whether the person has agreed to run the commands of this file with this content."""
    return _agreements(state).get(str(path)) == digest


def trust(path: Path, digest: str, state: Path) -> None:
    """Keep the person's agreement; a change of the file ends it."""
    agreements = {**_agreements(state), str(path): digest}
    write_private(state / "trusted.json", msgspec.json.format(msgspec.json.encode(agreements)))


def write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole, readable by this user alone; raises OperationError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OperationError(
            f"{path} cannot be written: {error.strerror}.", "Free space or correct the folder's permissions."
        ) from None


def _agreements(state: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode((state / "trusted.json").read_bytes(), type=dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
