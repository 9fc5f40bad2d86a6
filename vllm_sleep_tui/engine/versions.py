"""What each version of vLLM can do. Sleep needs 0.24; newer than known runs on the newest rules."""

from __future__ import annotations

import re

import msgspec

from vllm_sleep_tui.engine.backend.fit import PROVEN

Release = tuple[int, int]

SLEEP_FROM: Release = (0, 24)
NEWEST_KNOWN: Release = (0, 33)
_RELEASE = re.compile(r"v?(\d+)\.(\d+)")


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What may be asked of one server. "Source" is vLLM's own, read from 0.11 to 0.33."""

    why_not: str | None
    """Why it is not put to sleep, as a sentence; None if a sleep frees memory and a wake brings it back.

    From 0.24: 0.14 to 0.16 free only the KV cache (#32714), 0.17 to 0.22 take requests after a partial wake,
    before the weights are there (#44395)."""
    retry_wake: bool
    """On one GPU a wake that ran out of memory may be asked for again once there is room. From 0.26 (source);
    0.24 answers 500 `invalid argument` for ever after (h100/contract.jsonl). Several GPUs: never."""
    own_sleep: bool
    """Whether the panel's own sleep mode puts itself in place of vLLM's."""
    wake_tells: bool
    """The answer to a wake tells whether everything is awake. From 0.32 (WakeReply); others are asked."""
    releases_cache: bool
    """vLLM's own sleep mode can give up the KV cache alone, and the weights later. From 0.31 (source)."""
    note: str | None = None
    """What a person should know about running this version, as a sentence."""


def release_of(version: str) -> Release | None:
    """The first two numbers of a version; None if it has none."""
    match = _RELEASE.match(version.strip())
    return (int(match[1]), int(match[2])) if match else None


def capabilities(version: str) -> Capabilities:
    """What vLLM `version` can do."""
    read = release_of(version)
    release = read or NEWEST_KNOWN
    too_old = f"Sleep mode needs vLLM 0.24 or newer; this server runs {version}, whose sleep is not reliable."
    return Capabilities(
        why_not=too_old if release < SLEEP_FROM else None,
        retry_wake=release >= (0, 26),
        own_sleep="{}.{}".format(*release) in PROVEN,
        wake_tells=release >= (0, 32),
        releases_cache=release >= (0, 31),
        note=_note(version, read),
    )


def _note(version: str, release: Release | None) -> str | None:
    newest = "{}.{}".format(*NEWEST_KNOWN)
    if release is None:
        return f"Version {version!r} of vLLM cannot be read; treated like {newest}."
    if release > NEWEST_KNOWN:
        return f"vLLM {version} is newer than the newest known, {newest}; treated like that."
    return None


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 0.24.1rc2+cu128 is (0, 24, 1)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
