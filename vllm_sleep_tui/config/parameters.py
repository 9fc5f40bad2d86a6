"""How a model is asked: what a preset of the config, a conversation and a request may say about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import path_of, read_regular
from vllm_sleep_tui.text import one_line

MAX_FILE = 2**20
"""Bytes of a schema or of tools; the prompt would hold them."""
MOST_ALTERNATIVES = 20
"""Of a token, that vLLM tells without being started otherwise (`max-logprobs`)."""
EXPECTED = {
    "system": "text, which the model is told before everything else",
    "temperature": "a number from 0 to 100; 0 is the likeliest word each time",
    "top_p": "a number above 0 and up to 1",
    "max_tokens": "a whole number from 1",
    "seed": "a whole number",
    "stop": 'a text, or a list of texts such as ["###"]',
    "schema": "a JSON schema or the name of a file with one; {} is any JSON object",
    "tools": "a list of tools as OpenAI has them, or the name of a file with one",
    "logprobs": f"a whole number from 0 to {MOST_ALTERNATIVES}: the alternatives of each token",
}
"""What each of them takes, in words."""
FROM_A_FILE = ("schema", "tools")


class ParameterError(UsageError):
    """What is wrong with the parameter `name`."""

    def __init__(self, name: str, wrong: str, cure: str) -> None:
        super().__init__(f"{name} {wrong}.", cure)
        self.name = name
        self.wrong = wrong


class Parameters(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is left out is the server's to choose, as its model's `generation_config.json` says."""

    system: Annotated[str, Meta(min_length=1, description="Told before everything else.")] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    schema: Annotated[dict[str, Any], Meta(description="A JSON schema; {} is any JSON object.")] | None = None
    """What the answer has to be like."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the model may call; a call is shown and kept, and nobody carries it out."""
    logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    """How many alternatives of each token are told with their probabilities."""

    def body(self) -> dict[str, Any]:
        """What goes into the request; `system` is a message and stands among those."""
        plain: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        body = {name: value for name, value in plain.items() if value is not None}
        if self.stop:
            body["stop"] = self.stop
        if self.schema:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": self.schema},
            }
        elif self.schema is not None:
            body["response_format"] = {"type": "json_object"}
        if self.tools:
            body["tools"] = self.tools
        if self.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        return body

    def words(self) -> str:
        """`temperature 0 · seed 1 · JSON`; empty where all is the server's own."""
        parts = ["system prompt"] if self.system else []
        parts += [f"temperature {self.temperature:g}"] if self.temperature is not None else []
        parts += [f"top_p {self.top_p:g}"] if self.top_p is not None else []
        parts += [f"at most {self.max_tokens} tokens"] if self.max_tokens is not None else []
        parts += [f"seed {self.seed}"] if self.seed is not None else []
        parts += [f"stop {one_line(' '.join(map(repr, self.stop)))[:40]}"] if self.stop else []
        parts += ["JSON"] if self.schema is not None else []
        parts += [f"{len(self.tools)} tool{'s' * (len(self.tools) > 1)}"] if self.tools else []
        parts += ["logprobs"] if self.logprobs is not None else []
        return " · ".join(parts)


def parameters(
    values: Mapping[str, Any], folder: Path, reads: Callable[[Path], object] | None = None
) -> Parameters:
    """Those values, of which numbers may be text; raises ParameterError.

    `schema` and `tools` may be the name of a file, which counts from `folder`, or JSON as text; `reads` is
    told of a file before it is read.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ""}
    for name in FROM_A_FILE:
        if isinstance(text := given.get(name), str):
            given[name] = _json(name, text, folder, reads)
    if isinstance(text := given.get("stop"), str):
        given["stop"] = _stops(text)
    try:
        made = msgspec.convert(given, Parameters, strict=False)
    except msgspec.ValidationError as error:
        name = str(error).partition(" - at `$.")[2].strip("`").split("[")[0].split(".")[0]
        raise _wrong(name, given.get(name)) from None
    for name in given:
        try:
            msgspec.json.encode(getattr(made, name))
        except UnicodeEncodeError:  # half a character, as Python reads what is no UTF-8
            raise ParameterError(name, "holds a character that is not UTF-8", "Write it anew.") from None
    return made


def _wrong(name: str, value: object) -> ParameterError:
    shown = one_line(value if isinstance(value, str) else repr(value))[:40]
    return ParameterError(name, f"must be {EXPECTED[name]}, not {shown}", "Correct it, or leave it out.")


def _stops(text: str) -> Any:
    """A JSON list of texts; anything else is one text."""
    if not text.startswith("["):
        return [text]
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return [text]


def _json(name: str, text: str, folder: Path, reads: Callable[[Path], object] | None) -> Any:
    """What stands in JSON in a text, or in the file that it names."""
    source, cure = "the text", f"Write {EXPECTED[name]}."
    if not text.lstrip().startswith(("{", "[")):
        source = text
        try:
            path = folder / path_of(text).expanduser()
            source = str(path)
            if reads is not None:
                reads(path)
            text = read_regular(path, MAX_FILE, follow=True).decode()
        except OSError as error:
            raise ParameterError(name, f"cannot be read: {source}: {error.strerror}", cure) from None
        except UnicodeDecodeError:
            raise ParameterError(name, f"is not UTF-8 text: {source}", cure) from None
        except (RuntimeError, ValueError):  # the home of nobody; a character that no path has
            raise ParameterError(name, f"is no name of a file: {source}", cure) from None
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ParameterError(name, f"is no JSON: {source}: {one_line(str(error))}", cure) from None
