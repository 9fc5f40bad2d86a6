"""What a chat or completion request asks for, read and checked in vLLM's words."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_sleep_tui.simulator import generation, profiles
from vllm_sleep_tui.simulator.http import HttpError

TEMPLATE_TOKENS = 8
"""What a chat template adds to a message."""
PICTURE_TOKENS = 256
"""What a picture takes of the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A validated request."""

    id: str
    model: str
    prompt: list[int]
    question: str
    max_tokens: int
    ignore_eos: bool
    logprobs: bool
    chat: bool
    include_usage: bool
    continuous_usage: bool
    calls: list[dict[str, object]] = field(default_factory=list)
    """What is called instead of an answer in words, an entry a token."""
    alternatives: int | None = None
    """Of each token, where `logprobs` are asked for."""


def max_tokens(body: Mapping[str, Any], length: int, prompt: int) -> int:
    """The limit of the answer, clamped to what the context leaves; raises HttpError."""
    wanted = body.get("max_completion_tokens", body.get("max_tokens"))
    if wanted is None:
        return length - prompt
    if wanted < 1:
        text = f"max_tokens must be at least 1, got {wanted}. (parameter=max_tokens, value={wanted})"
        raise HttpError(400, text, param="max_tokens")
    if wanted > length:
        text = (
            f"max_tokens={wanted} cannot be greater than max_model_len={length}. Please request fewer output "
            f"tokens. (parameter=max_tokens, value={wanted})"
        )
        raise HttpError(400, text, param="max_tokens")
    return max(1, min(int(wanted), length - prompt))


def check_length(prompt: list[int], length: int) -> None:
    """Raise HttpError for a prompt that the context cannot hold."""
    if len(prompt) > length:
        raise HttpError(400, _too_long(length), param="input_tokens")


def check_temperature(body: Mapping[str, Any]) -> None:
    """Raise HttpError for a negative temperature."""
    given = float(body.get("temperature") or 0)
    if given < 0:
        text = f"temperature must be non-negative, got {given}. (parameter=temperature, value={given})"
        raise HttpError(400, text, param="temperature")


def _too_long(length: int) -> str:
    return (
        f"This model's maximum context length is {length} tokens. However, your prompt contains "
        f"at least {length + 1} "
        "input tokens, which exceeds this limit even without any output tokens. Please reduce "
        "the length of the input "
        f"prompt. (parameter=input_tokens, value={length + 1})"
    )


def chat_tokens(messages: list[Mapping[str, Any]]) -> list[int]:
    """The ids of a conversation."""
    text = " ".join(_content(message) for message in messages)
    pictures = sum(len(pictures_of(message)) for message in messages)
    return [
        *range(TEMPLATE_TOKENS * len(messages) + PICTURE_TOKENS * pictures),
        *generation.token_ids(text),
    ]


def pictures_of(message: Mapping[str, Any]) -> list[str]:
    """The addresses of a message's pictures."""
    content = message.get("content") or ""
    parts = [] if isinstance(content, str) else content
    return [part["image_url"]["url"] for part in parts if part.get("type") == "image_url"]


def check_pictures(messages: list[Mapping[str, Any]], model: str, name: str) -> None:
    """Raise HttpError for pictures that the model or the server cannot take (recorded on vLLM 0.32)."""
    urls = [url for message in messages for url in pictures_of(message)]
    if urls and not profiles.sees(model):
        raise HttpError(400, f"{name} is not a multimodal model", kind="BadRequestError")
    for url in urls:
        _decoded(url)


def _decoded(url: str) -> bytes:
    """The content of a `data:` URL; others are not fetched here."""
    head, _, data = url.partition(",")
    try:
        content = base64.b64decode(data, validate=True)
    except ValueError:
        content = b""
    if not head.startswith("data:") or not content:
        raise HttpError(400, "Failed to load image: cannot identify image file", kind="BadRequestError")
    return content


def question(messages: list[Mapping[str, Any]]) -> str:
    """What the user asked last."""
    asked = [_content(message) for message in messages if message.get("role") == "user"]
    return asked[-1] if asked else ""


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or _picture_words(part) for part in content)


def _picture_words(part: Mapping[str, Any]) -> str:
    """Kind and digest of a picture, so that a test sees in an answer that it came whole."""
    if part.get("type") != "image_url":
        return f"[{part.get('type', 'part')}]"
    url = part["image_url"]["url"]
    return f"[{url[5:].partition(';')[0]} {hashlib.sha256(_decoded(url)).hexdigest()[:12]}]"
