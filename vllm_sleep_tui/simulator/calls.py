"""Tool calls and log-probabilities of a simulated answer, in the events that vLLM 0.32 makes of them."""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST_CALLS = 2


def call_events(tools: Sequence[Mapping[str, Any]], question: str) -> Iterator[dict[str, object]]:
    """What stands in `delta.tool_calls`, token by token: a call's name, then its arguments in pieces."""
    for index, tool in enumerate(tools[:MOST_CALLS]):
        function = tool.get("function") or {}
        yield {
            "id": f"chatcmpl-tool-{uuid.uuid4().hex[:16]}",
            "type": "function",
            "index": index,
            "function": {"name": str(function.get("name", ""))},
        }
        for piece in re.findall(r"\s*[^\s]+", arguments(function.get("parameters") or {}, question)):
            yield {"index": index, "function": {"arguments": piece}}


def arguments(schema: Mapping[str, Any], question: str) -> str:
    """JSON for a tool's parameters: texts are words of the question, numbers are their count."""
    words = question.split() or [""]
    made: dict[str, object] = {}
    for place, (name, kind) in enumerate((schema.get("properties") or {}).items()):
        match kind.get("type"):
            case "integer" | "number":
                made[name] = len(words)
            case "boolean":
                made[name] = True
            case "array":
                made[name] = words
            case _:
                made[name] = " ".join(words) if place == 0 else words[-1]
    return json.dumps(made, ensure_ascii=False)


def chances(token: str, alternatives: int) -> dict[str, object]:
    """What stands in `logprobs` of a choice: the token, and what might have stood there."""
    state = zlib.crc32(token.encode())
    own = -(state % 1000) / 1000
    others = [(f" word{state % 89 + place}", own - 1 - place) for place in range(alternatives - 1)]
    listed = [_chance(word, logprob) for word, logprob in [(token, own), *others][:alternatives]]
    return {"content": [{**_chance(token, own), "top_logprobs": listed}]}


def _chance(token: str, logprob: float) -> dict[str, object]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
