"""Where files are found: the user's folders, and the config that a command is about."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from urllib.parse import quote

import platformdirs

from vllm_sleep_tui.config.types import CONFIG_NAME
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import private_dir

APP = "vllm-sleep-tui"
FILE_NAME_LENGTH = 120
"""Of a model's name in a file's, which may have 255 with what stands around it."""


def config_dir() -> Path:
    """The user's config folder (XDG_CONFIG_HOME is honoured); it need not exist."""
    return platformdirs.user_config_path(APP)


def state_dir() -> Path:
    """The user's state folder (XDG_STATE_HOME is honoured), private; raises OperationError."""
    return private_dir(platformdirs.user_state_path(APP))


def file_name(name: str) -> str:
    """A model's name as part of a file's name: itself where that is safe, else with what is not as %XX.

    Two names never share one; a long one is cut and ends in its digest.
    """
    safe = quote(name, safe="")
    if safe.startswith("."):
        safe = f"%2E{safe[1:]}"
    if len(safe) <= FILE_NAME_LENGTH:
        return safe
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{safe[: FILE_NAME_LENGTH - 17]}-{digest}"


def here() -> Path:
    """The current folder; one that was removed is `.`, in which nothing is found."""
    try:
        return Path.cwd()
    except OSError:
        return Path()


def absolute(path: Path) -> Path:
    """The path from the root, links not followed; raises UsageError if that needs a folder that is gone."""
    try:
        return Path(os.path.abspath(path))
    except OSError:
        raise UsageError(
            f"{path}: the current folder is gone", "Change to another, or write the whole path."
        ) from None


def find_config(explicit: Path | None) -> Path:
    """The given config file, else the current folder's, else the user's; raises UsageError if none."""
    if explicit is not None:
        _check_is_file(explicit)
        return explicit
    for candidate in _candidates():
        if os.path.isfile(candidate):
            return candidate
    raise UsageError(
        f"No {CONFIG_NAME} here nor in {config_dir()}.",
        f"Write one with: {APP} init, or look at the demo: {APP} demo",
    )


def has_config() -> bool:
    """Whether anything has the name of a config where one is looked for, fit to be read or not."""
    return any(map(os.path.lexists, _candidates()))


def _candidates() -> tuple[Path, Path]:
    return Path(CONFIG_NAME), config_dir() / CONFIG_NAME


def _check_is_file(path: Path) -> None:
    """Raises UsageError if the path is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        cure = f"Write one with: {APP} init, or look at the demo: {APP} demo"
        raise UsageError(f"{path}: no such file", cure) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in it
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{path}: cannot be read: {why}", "Give another file with --config.") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path}: a folder, not a file", f"Name the file: {path / CONFIG_NAME}")
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path}: a pipe or a device, not a file", "Give another file with --config.")
