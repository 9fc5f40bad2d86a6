"""What an answer is made of beside its words: what the model calls, and what it might have said instead."""

from __future__ import annotations

import msgspec


class CallDelta(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of what the model calls; pieces with the same `index` are of one call.

    Its first piece has `id` and `name`. The arguments are JSON unless the model or vLLM's parser erred.
    """

    index: int = 0
    id: str = ""
    name: str = ""
    arguments: str = ""


class Alternative(msgspec.Struct, frozen=True):
    """A token that might have stood there, and the logarithm of its probability."""

    token: str
    logprob: float


class TokenChance(msgspec.Struct, frozen=True):
    """A token of the answer, and what might have stood in its place, the likeliest first."""

    token: str
    logprob: float
    top_logprobs: tuple[Alternative, ...] = ()
