"""What each version of vLLM can do. Sleep needs 0.24; newer than known runs on the newest rules."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_sleep_tui.engine.endpoints import COLLECTIVE_RPC, IS_SLEEPING, SLEEP, WAKE_UP

Release = tuple[int, int]

SLEEP_FROM: Release = (0, 24)
NEWEST_KNOWN: Release = (0, 33)
SLEEP_PATHS = frozenset({SLEEP, WAKE_UP, IS_SLEEPING, COLLECTIVE_RPC})
_RELEASE = re.compile(r"v?(\d+)\.(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What may be asked of one server. "Source" is vLLM's own, read from 0.11 to 0.33."""

    version: str
    sleep: bool
    """Sleep frees memory and a wake brings it back. From 0.24: 0.14 to 0.16 free only the KV cache (#32714),
    0.17 to 0.22 take requests after a partial wake, before the weights are there (#44395)."""
    why_not: str | None
    """Why `sleep` is false, as a sentence."""
    json_replies: bool
    """`/sleep` and `/wake_up` say the status; before 0.32 they answer 200 with no body (source;
    h100/contract.jsonl)."""
    retry_wake: bool
    """On one GPU a wake that ran out of memory may be asked for again once there is room. From 0.26 (source);
    0.24 answers 500 `invalid argument` for ever after (h100/contract.jsonl). Several GPUs: never."""
    sleep_after_partial_wake: bool
    """`/sleep` works while only the weights are awake. From 0.31 (source); before, it does nothing and
    says 200."""
    level_checked: bool
    """Levels other than 0 to 2 get 400. From 0.32 (source); 0.24 takes level 3 and ruins the weights
    (h100/contract.jsonl)."""
    refuses_while_paused: bool
    """New requests to a paused server get 503 instead of hanging. From 0.33 (source)."""
    note: str | None = None
    """What a person should know about running this version, as a sentence."""


def release_of(version: str) -> Release | None:
    """The first two numbers of a version; None if it has none."""
    known = _RELEASE.match(version.strip())
    return (int(known[1]), int(known[2])) if known else None


def capabilities(version: str, paths: frozenset[str] | None = None) -> Capabilities:
    """What vLLM `version` can do; `paths` are the server's routes if they were asked for."""
    known = release_of(version)
    release = known or NEWEST_KNOWN
    why_not = _why_not(version, release, paths)
    return Capabilities(
        version=version,
        sleep=why_not is None,
        why_not=why_not,
        json_replies=release >= (0, 32),
        retry_wake=release >= (0, 26),
        sleep_after_partial_wake=release >= (0, 31),
        level_checked=release >= (0, 32),
        refuses_while_paused=release >= (0, 33),
        note=_note(version, release if known else None),
    )


def _why_not(version: str, release: Release, paths: frozenset[str] | None) -> str | None:
    if release < SLEEP_FROM:
        return (
            f"Sleep mode needs vLLM 0.24 or newer; this server runs {version}, whose sleep is not reliable."
        )
    if paths is not None and (missing := SLEEP_PATHS - paths):
        return (
            f"The server has no {', '.join(sorted(missing))}: "
            "it was started without VLLM_SERVER_DEV_MODE=1 in its environment."
        )
    return None


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
