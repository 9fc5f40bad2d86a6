"""Runs inside vLLM's own Python: writes the flags of `vllm serve` as JSON, as its parser has them.

Standard library and vLLM alone; needs no GPU; imports nothing of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

PROBES = (("{}", dict, "json"), ("1k", int, "size"), ("1", int, "int"), ("1.5", float, "float"))
"""What a flag's type makes of a text says what it is: its name differs from version to version."""
MAX_HELP = 200
"""Characters: an editor shows it beside the flag."""


def main() -> None:
    """Print one JSON object: vLLM's version and its flags."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs on standard output while it is imported
    # This file's folder is first in the path, and its `logs` or `client` are not what vLLM means.
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    parser = serve_parser()
    flags = [described(action, parser) for action in parser._actions if takes_part(action)]
    json.dump({"version": version(), "flags": flags}, answer, separators=(",", ":"))
    answer.close()
    sys.stderr.flush()
    os._exit(0)  # vLLM's imports leave threads that take seconds to go


def version() -> str:
    """The version of the vLLM that was imported."""
    import vllm

    return str(vllm.__version__)


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `vllm serve`, wherever this version keeps what makes it."""
    from vllm import platforms

    if platforms.current_platform.is_unspecified():  # no GPU to be seen: as `vllm bench` does then
        from vllm.platforms.cpu import CpuPlatform

        platforms.current_platform = CpuPlatform()
    from vllm.entrypoints.cli.serve import make_arg_parser

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser
    parser: argparse.ArgumentParser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    return parser


def takes_part(action: argparse.Action) -> bool:
    """Whether it is a flag: neither the positional model nor the help."""
    return bool(action.option_strings) and not isinstance(action, argparse._HelpAction)


def described(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, object]:
    """One flag: its spellings, and what may follow it."""
    flag: dict[str, object]
    if action.nargs == 0:
        spellings = set_by(action, parser)
        flag = {"names": list(spellings), "type": "switch"}
        if off := [name for name, value in spellings.items() if value is False]:
            flag["off"] = off
    else:
        flag = {"names": list(action.option_strings), "type": kind_of(action.type)}
        flag |= {"nargs": action.nargs, "const": shown(action.const)}
        flag["repeats"] = isinstance(action, argparse._AppendAction)
        flag["choices"] = [str(choice) for choice in action.choices or () if choice is not None]
    flag["default"] = shown(action.default)
    flag["help"] = line_of(action.help)
    return {
        name: value
        for name, value in flag.items()
        if value is not None and value is not False and value != []
    }


def line_of(text: str | None) -> str:
    """What a flag is for: the first paragraph of its help on one line, cut at MAX_HELP characters."""
    if not text or text == argparse.SUPPRESS:
        return ""
    line = " ".join(text.strip().split("\n\n")[0].replace("%%", "%").split())
    return line if len(line) <= MAX_HELP else f"{line[: MAX_HELP - 1].rstrip()}…"


def set_by(action: argparse.Action, parser: argparse.ArgumentParser) -> dict[str, object]:
    """What each spelling of a flag without a value sets: `--no-x` false, spellings that help hides too."""
    defaults: dict[str, object] = {}
    for name in [name for name, other in parser._option_string_actions.items() if other is action]:
        namespace = argparse.Namespace()
        try:
            action(parser, namespace, [], name)
        except Exception:
            continue
        defaults[name] = shown(getattr(namespace, action.dest, None))
    return defaults


def kind_of(convert: Any) -> str:
    """json, size (32k), int, float or text: by trying it."""
    if convert is None:
        return "text"
    for text, kind, name in PROBES:
        try:
            if type(convert(text)) is kind:
                return name
        except Exception:
            continue
    try:
        return "text" if convert("a b") == "a b" else "object"
    except Exception:
        return "object"


def shown(value: object) -> object:
    """A plain value as it is, anything else as nothing."""
    if value == argparse.SUPPRESS:
        return None
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(item, (int, float, str)) for item in value):
        return list(value)
    return None


if __name__ == "__main__":
    main()
