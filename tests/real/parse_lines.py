"""Runs inside vLLM's own Python: whether its parser sees the same in both command lines of a pair.

Pairs come as JSON on standard input, each two lists of words after `vllm serve`; the answer is a list of null
(the same) or a text: what the parser said to the first, or how the second differs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys

OURS = {"host", "port", "served_model_name", "api_key", "api_server_count", "middleware", "enable_sleep_mode"}
OURS |= {"disable_access_log_for_endpoints"}
"""What this program sets whatever the line said."""


class RefusedError(Exception):
    """The parser's complaint."""


def main() -> None:
    """Answer all pairs."""
    pairs = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location("dump_parser", sys.argv[1])
    dump_parser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dump_parser)
    parser = dump_parser.serve_parser()

    def refuse(message: str) -> None:
        raise RefusedError(message)

    parser.error = refuse
    json.dump([verdict(parser, *pair) for pair in pairs], answer)
    answer.close()
    os._exit(0)


def verdict(parser, written, ours):
    """None if both mean the same to the parser."""
    try:
        one = vars(parser.parse_args(written))
    except RefusedError as error:
        return str(error)
    try:
        other = vars(parser.parse_args(ours))
    except RefusedError as error:
        return f"ONLY OURS IS REFUSED: {error}"
    differing = {
        name: (one.get(name), other.get(name))
        for name in one.keys() | other.keys()
        if name not in OURS and shown(one.get(name)) != shown(other.get(name))
    }
    return f"DIFFERENT: {differing!r}" if differing else None


def shown(value):
    """A parsed value as text, without the random id that some configs give themselves."""
    return re.sub(r"engine_id='[0-9a-f-]{36}'", "", repr(value))


if __name__ == "__main__":
    main()
