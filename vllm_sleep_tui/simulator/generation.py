"""What a simulated model says: the same for the same question, and recognisable as a simulation."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

FILLER = (
    "Nothing here was computed: a simulator wrote it, word by word, at the pace of a real server.",
    "The words are the same for the same question, so that two answers can be compared.",
    "While this model talks, the others keep their weights in RAM, or only their place on disk.",
    "A model that sleeps leaves a little memory on the GPU and comes back in under a second.",
    "Stopping and starting again would have taken the better part of a minute.",
    "First the scheduler pauses, then the pages are unmapped, and the GPU is free for a neighbour.",
    "On the way back the weights are copied first, then the cache is mapped, then this line is written.",
    "Ask the same thing after a sleep: if a single word differs, something was lost on the way.",
)
GARBAGE = "!"
"""A token of a model whose weights are gone; an empty text up to 0.24 (h100/contract.jsonl)."""
VOCABULARY = 151936
"""Of Qwen3."""


def answer(name: str, question: str) -> list[str]:
    """The tokens of the whole answer, about 60 to 120."""
    seed = zlib.crc32(question.encode())
    sentences = [FILLER[(seed + step) % len(FILLER)] for step in range(3 + seed % 4)]
    quoted = " ".join(question.split())[:200]
    opening = f"I am {name}, simulated. You asked: “{quoted}”."
    return _words(" ".join([opening, *sentences]))


def endless(tokens: Sequence[str]) -> Iterator[str]:
    """The tokens again and again, for a request that ignores the end."""
    while True:
        yield from tokens
        yield " "


def token_ids(text: str) -> list[int]:
    """One id a word or mark; the same text gives the same ids."""
    return [zlib.crc32(word.encode()) % VOCABULARY for word in _words(text)]


def token_text(token: int) -> str:
    """A word for an id."""
    return f" w{token}"


def prompt_logprobs(
    model: str, tokens: Sequence[int], *, garbage: bool
) -> list[Mapping[str, Mapping[str, object]] | None]:
    """vLLM's form: null for the first token, then a map by token id as text; far off without weights."""
    found: list[Mapping[str, Mapping[str, object]] | None] = [None]
    state = zlib.crc32(model.encode())
    for previous, token in itertools.pairwise(tokens):
        state = zlib.crc32(f"{state} {previous} {token}".encode())
        logprob = -11.93 if garbage else -0.05 - (state % 6000) / 1000
        entry = {"logprob": logprob, "rank": 1 + state % 40, "decoded_token": token_text(token)}
        found.append({str(token): entry})
    return found


def embedding(model: str, tokens: Sequence[int], *, garbage: bool) -> list[float]:
    """A unit-free vector of 64 numbers; of nothing but zeros if the weights are gone."""
    state = zlib.crc32(f"{model} {list(tokens)}".encode())
    return [
        0.0 if garbage else (zlib.crc32(f"{state} {place}".encode()) % 2001 - 1000) / 1000
        for place in range(64)
    ]


def _words(text: str) -> list[str]:
    return re.findall(r"\s*[^\s]+", text)
