"""Starts a model many times while another user takes its port as soon as it is seen; must run as root.

    python benchmarks/squatted_starts.py --starts 200
    python benchmarks/squatted_starts.py --starts 5 --vllm /path/to/vllm --model /path/to/tiny

Every second port is let go again after 0.3 s, before the server wants it, so that the start goes on;
the others are kept, and the start must fail and say whose the port is. Exit 1 if a single byte was heard.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.squatter import squatter

CPU_ARGS = {"enforce-eager": True, "kv-cache-memory-bytes": "128M", "max-model-len": 2048}
CPU_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


def verb(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb over the config, in a state folder of its own."""
    env = os.environ | {"XDG_STATE_HOME": str(config.parent / "state")}
    argv = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)


def main() -> int:
    """Start, stop, count what was heard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=200)
    parser.add_argument("--vllm")
    parser.add_argument("--model", default="sim/1GiB")
    arguments = parser.parse_args()
    name = f"squatted-{os.getpid()}"
    simulated = {"args": {"max-model-len": 2048}, "env": {"VLLM_SIM_SPEED": "30"}}
    real = {"gpus": [], "args": CPU_ARGS, "env": CPU_ENV}
    model = {"model": arguments.model, "level": 1} | (real if arguments.vllm else simulated)
    content: dict[str, object] = {"models": {name: model}}
    if arguments.vllm:
        content["vllm_command"] = [arguments.vllm]
    else:
        content["vllm_command"] = [sys.executable, "-m", "vllm_sleep_tui.simulator"]
        content["simulated_gpus"] = [{"name": "Bench", "memory": "24GiB"}]
    counts = {"starts": 0, "squatted": 0, "started": 0, "refused": 0, "other": 0, "bytes heard": 0}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "vllm-sleep-tui.yaml"
        config.write_text(json.dumps(content))
        for number in range(arguments.starts):
            with squatter(name, seconds=0.3 if number % 2 else 0.0) as other:
                done = verb(config, "start", name)
                if done.returncode == 0:
                    stopped = verb(config, "stop", name, "--force")
                    assert stopped.returncode == 0, stopped.stderr
                heard = other.end()
            counts["starts"] += 1
            counts["squatted"] += len(other.ports)
            counts["bytes heard"] += sum(map(len, heard))
            failed = "refused" if "is taken by" in done.stderr else "other"
            kind = failed if done.returncode else "started"
            counts[kind] += 1
            if heard or kind == "other":
                said = done.stderr.strip()
                print(f"start {number}: exit {done.returncode} {said!r}, heard {heard}", flush=True)
            if number % 10 == 9 or arguments.vllm:
                print(time.strftime("%H:%M:%S"), counts, flush=True)
    print(json.dumps(counts))
    return 1 if counts["bytes heard"] else 0


if __name__ == "__main__":
    sys.exit(main())
