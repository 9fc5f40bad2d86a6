"""Pictures of a question: named in its text or beside it, read when they are sent, kept by path and digest.

In a question a picture is named by a mark: ``@photo.png``, ``@"my photo.png"``, ``@~/photo.png``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import struct
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import as_text, path_of, read_regular
from vllm_sleep_tui.paths import here

MOST_BYTES = 20 * 2**20
"""Of one picture; no model looks at more, whoever serves it."""
MOST_PICTURES = 16
"""Of one question."""
MOST_SENT = 64 * 2**20
"""Of all pictures that go with one question, those of earlier ones included."""
_MIB = 2**20
_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_MARK = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|(\S*[^\s?!.,;:)]))""")
"""The question's own marks after a name are not the name's."""
NO_FILE = "Name a picture's file; a word with an @ is sent as a word with a blank after the @."
_KINDS = "PNG, JPEG, GIF and WebP"


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One picture, without what is in it."""

    path: str
    """Absolute, links not followed."""
    digest: str
    """SHA-256 of the file, in hexadecimal."""
    kind: str
    """Such as image/png, by the file's content."""
    bytes: int
    size: tuple[int, int] | None = None
    """Columns and rows; None if the file does not say."""

    @property
    def words(self) -> str:
        """`photo.png · 640×480 · 53 KB`."""
        parts = [path_of(self.path).name, *([f"{self.size[0]}×{self.size[1]}"] if self.size else [])]
        size = f"{self.bytes / 1000:.0f} KB" if self.bytes < 1_000_000 else f"{self.bytes / 1e6:.1f} MB"
        return " · ".join([*parts, size])


# ── what a question names ────────────────────────────────────────────────────────────────────────────────


def pictures_in(text: str) -> tuple[Picture, ...]:
    """The pictures that a question's marks name; raises UsageError if one of them cannot be sent.

    A word with an @ before it that does not end like a picture is a word.
    """
    return look_at([path for match in _MARK.finditer(text) if (path := _named(match)) is not None])


def look_at(paths: Sequence[Path]) -> tuple[Picture, ...]:
    """What these files are; raises UsageError if one cannot be sent, or there are too many."""
    if len(paths) > MOST_PICTURES:
        raise UsageError(
            f"{len(paths)} pictures are too many for one question.", f"Ask about at most {MOST_PICTURES}."
        )
    pictures = tuple(_picture(path)[0] for path in dict.fromkeys(_from_root(path) for path in paths))
    if sum(picture.bytes for picture in pictures) > MOST_SENT:
        raise UsageError(
            f"{len(pictures)} pictures of together more than {MOST_SENT // _MIB} MiB are too much at once.",
            "Make them smaller, or ask about some of them first.",
        )
    return pictures


def marked(text: str, pictures: Sequence[Picture]) -> str:
    """A question with a mark for each picture, as it would be typed."""
    return " ".join([text, *(_mark(path_of(picture.path)) for picture in pictures)])


def said(text: str, pictures: Sequence[Picture]) -> dict[str, Any]:
    """What the person asked, as a message for `Fleet.chat`."""
    message: dict[str, Any] = {"role": "user", "content": _unmarked(text, pictures)}
    return message | ({"pictures": tuple(pictures)} if pictures else {})


def _unmarked(text: str, pictures: Sequence[Picture]) -> str:
    """A question as the model is told it: a mark at its end is left out, elsewhere the file's name stands."""
    paths = {picture.path for picture in pictures}

    def named(match: re.Match[str]) -> str:
        path = _named(match)
        if path is None or as_text(_from_root(path)) not in paths:
            return match[0]
        return path.name if _MARK.sub("", text[match.end() :]).strip() else ""

    return _MARK.sub(named, text).strip() if pictures else text


def dropped(text: str) -> str | None:
    """Marks for a text that is nothing but paths of pictures, as terminals give what is dropped on them.

    They quote such a path, put a backslash before its blanks, or write a file: URL. None for any other.
    """
    text = text.strip()
    if not text or "\n" in text:
        return None
    whole = _path_of(text)
    if whole is not None:
        return _mark(whole)
    try:
        paths = [_path_of(word) for word in shlex.split(text)]
    except ValueError:  # a quote that is not closed
        return None
    found = [path for path in paths if path is not None]
    return " ".join(map(_mark, found)) if found and len(found) == len(paths) else None


def _path_of(word: str) -> Path | None:
    if word.startswith("file://"):
        try:
            word = unquote(urlsplit(word).path)
        except ValueError:  # such as file://[
            return None
    if not word.lower().endswith(_SUFFIXES) or "\0" in word:
        return None
    path = _at_home(word)
    return path if path.is_absolute() and _is_file(path) else None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _named(match: re.Match[str]) -> Path | None:
    """The path of a mark; None if it is a word."""
    name = match[1] or match[2]
    if not name.lower().endswith(_SUFFIXES) or "\0" in name:
        return None
    return _at_home(name)


def _at_home(name: str) -> Path:
    """The path of what is typed; ~ and the name of nobody is left as it is, where pathlib's own raises."""
    return Path(os.path.expanduser(name))


def _mark(path: Path) -> str:
    text = str(path)
    return f'@"{text}"' if re.search(r"\s", text) else f"@{text}"


def _from_root(path: Path) -> Path:
    return here() / path


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────


def data_url(picture: Picture) -> str:
    """The picture as it is sent; raises UsageError if its file is not there any more, or is another."""
    found, content = _picture(path_of(picture.path))
    if found.digest != picture.digest:
        raise UsageError(f"{picture.path} has changed since it was asked about.", "Ask about it anew.")
    return f"data:{found.kind};base64,{b64encode(content).decode()}"


def _picture(path: Path) -> tuple[Picture, bytes]:
    """A file and what is in it; raises UsageError if it is no picture that can be sent."""
    shown = as_text(path)
    try:
        content = read_regular(path, MOST_BYTES, follow=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if reason.startswith("it is larger"):
            raise UsageError(
                f"{shown} is larger than the {MOST_BYTES // _MIB} MiB that are sent of one picture.",
                "Make it smaller first, such as: magick IN -resize 2048x2048 OUT.jpg",
            ) from None
        raise UsageError(f"{shown} cannot be read: {reason}.", NO_FILE) from None
    kind, size = _looks(content)
    if kind is None:
        raise UsageError(f"{shown} is no picture: {_KINDS} are sent.", "Convert it to one of them first.")
    digest = hashlib.sha256(content).hexdigest()
    return Picture(path=shown, digest=digest, kind=kind, bytes=len(content), size=size), content


def _looks(content: bytes) -> tuple[str | None, tuple[int, int] | None]:
    """Kind and size by the first bytes; the size is None where they do not tell."""
    try:
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return "image/png", struct.unpack_from(">II", content, 16)
        if content.startswith((b"GIF87a", b"GIF89a")):
            return "image/gif", struct.unpack_from("<HH", content, 6)
        if content.startswith(b"\xff\xd8\xff"):
            return "image/jpeg", _jpeg_size(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return "image/webp", None
    except struct.error:  # it ends within its head: whoever is asked says so
        return None, None
    return None, None


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """From the first frame's head, which follows segments of any kind."""
    at = 2
    while at + 9 < len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], struct.unpack_from(">H", content, at + 2)[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = struct.unpack_from(">HH", content, at + 5)
            return columns, rows
        at += 2 + length
    return None
