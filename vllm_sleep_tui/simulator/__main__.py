"""``python -m vllm_sleep_tui.simulator serve MODEL …``: as much of `vllm` as is played."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm_sleep_tui.simulator import arguments, logs, settings
from vllm_sleep_tui.simulator.server import ApiServer

USAGE = """usage: vllm [-h] [-v]
            {chat,complete,serve,launch,bench,collect-env,download-kernels,preload,run-batch,snapshot}
            ..."""
UTILIZATION_DEFAULT = 0.92
"""Of vLLM from 0.20 on."""


def main(given: Sequence[str]) -> int:
    """Run one command; the exit code."""
    chosen = settings.from_environment()
    if list(given) in (["--version"], ["-v"]):
        logs.raw(chosen.version)
        return 0
    try:
        if not given or given[0] != "serve":
            raise arguments.ArgumentError(
                f"invalid choice: {given[0] if given else ''!r} (choose from 'serve')"
            )
        options = arguments.parse(given[1:], UTILIZATION_DEFAULT, chosen.version)
    except arguments.ArgumentError as error:
        logs.raw(f"{USAGE}\nvllm: error: {error}", descriptor=2)
        return 2
    return ApiServer(options, chosen).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
