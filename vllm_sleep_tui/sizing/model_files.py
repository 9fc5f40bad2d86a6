"""Reads a model's files as what they are, a stranger's: regular ones only, and of bounded size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import NotAFileError, open_regular
from vllm_sleep_tui.text import one_line

CONFIG_LIMIT = 16 * 2**20
"""Bytes of a config.json; the largest ones, with a setting for each layer, have some hundred thousand."""
REF_LIMIT = 256
"""Bytes of a file that names a revision."""
SHOWN_LENGTH = 120
"""Characters of a name from outside."""
AGAIN = "Fetch the model again, or name another."


def open_file(path: Path) -> BinaryIO:
    """Open a file to read it; raises UsageError for anything else, which could be read without an end.

    Links are followed: the files of a hub cache are links.
    """
    try:
        return os.fdopen(open_regular(path, follow=True), "rb")
    except NotAFileError:
        raise UsageError(f"{shown(path)}: not a file.", AGAIN) from None
    except (OSError, ValueError) as error:  # ValueError for a name that holds a NUL
        why = getattr(error, "strerror", None) or "it has no possible name"
        raise UsageError(f"{shown(path)}: cannot be read: {why}.", AGAIN) from None


def read_whole(path: Path, limit: int) -> bytes:
    """A file's content; raises UsageError if it cannot be read or has more than `limit` bytes."""
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise UsageError(f"{shown(path)}: cannot be read: {error.strerror}.", AGAIN) from None
    if len(content) > limit:
        raise UsageError(f"{shown(path)}: more than {limit >> 20} MiB, which no such file has.", AGAIN)
    return content


def read_config(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """A model's config.json as transformers reads it, Infinity and NaN included; raises UsageError."""
    content = read_whole(path, limit)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):  # the last for brackets that are nested without an end
        raise UsageError(f"{shown(path)}: not JSON.", AGAIN) from None
    if not isinstance(config, dict):
        raise UsageError(f"{shown(path)}: not a model's config.", AGAIN)
    return config


def main_snapshot(cached: Path) -> Path | None:
    """The folder of `main` of a model in the Hugging Face cache; None if the cache names none."""
    try:
        revision = read_whole(cached / "refs/main", REF_LIMIT).decode("ascii").strip()
    except (UsageError, UnicodeDecodeError):
        return None
    return cached / "snapshots" / revision if revision.isalnum() else None


def is_weights_name(name: str) -> bool:
    """Whether an index may name this file: one beside or below it, no option of a program that fetches."""
    is_below = not os.path.isabs(name) and ".." not in name.split("/") and not name.startswith("-")
    return is_below and name.endswith(".safetensors") and name.isprintable()


def with_home(name: str) -> Path:
    """A path as a config gives it; `~` stays for a user that this machine does not have."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def shown(name: object) -> str:
    """A name from outside as it may be written on a terminal."""
    text = one_line(str(name))
    return text if len(text) <= SHOWN_LENGTH else f"{text[:SHOWN_LENGTH]}…"
