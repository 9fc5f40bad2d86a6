"""Builds the image of the Containerfile and switches between two simulated models in it.

python3.11 tests/install/image.py [--mirror URL]

Needs root, buildah and debootstrap (`apt-get install --no-install-recommends buildah debootstrap`) and no
registry: under the name of vLLM's image stands a Debian with Python. So what it shows is that
the file builds, that its command works with the folders that the image sets; not that vLLM runs in
it, nor, as buildah isolates by chroot here, that the servers end with the container. Takes some five minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = "python3,python3-venv,ca-certificates,procps"
SPEED = "20"


def run(*command: str | Path) -> str:
    """Run to its end; its stdout. Exits with what it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    """Make the base, build on it, and use what came of it."""
    parser = argparse.ArgumentParser(description="Build the image of the Containerfile, and use it.")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="of Debian, for the base")
    given = parser.parse_args()
    text = (ROOT / "Containerfile").read_text()
    base, version = re.findall(r"^FROM (.+):\$", text, re.M)[0], re.findall(r"^ARG VLLM=(.+)$", text, re.M)[0]
    with tempfile.TemporaryDirectory(prefix="vst-") as name:
        work = Path(name)
        store = ("--root", work / "store", "--runroot", work / "run", "--storage-driver", "vfs")

        def buildah(*words: str | Path) -> str:
            return run("buildah", *store, *words)

        run(
            "debootstrap",
            "--variant=minbase",
            f"--include={PACKAGES}",
            "bookworm",
            work / "base",
            given.mirror,
        )
        empty = buildah("from", "scratch")
        buildah("add", "--quiet", empty, work / "base", "/")
        buildah("commit", "--quiet", empty, f"{base}:{version}")
        print("the base stands", flush=True)
        # pip trusts in the image whom it trusts here.
        trust = ("--volume", "/etc/ssl/certs:/etc/ssl/certs:ro")
        isolated = ("--isolation", "chroot")
        buildah(
            "build", *isolated, "--pull-never", "--network", "host", *trust, "--tag", "panel",
            "--file", ROOT / "Containerfile", ROOT,
        )  # fmt: skip
        made = json.loads(buildah("inspect", "--type", "image", "panel"))["OCIv1"]["config"]
        if (made["Entrypoint"], made["Cmd"]) != (["vllm-sleep-tui"], ["serve"]):
            sys.exit(f"the image starts {made['Entrypoint']} {made['Cmd']}")
        print("the image is built", flush=True)
        container = buildah("from", "--pull-never", "panel")

        def panel(*words: str) -> str:
            return buildah("run", *isolated, container, "--", "vllm-sleep-tui", *words)

        # In the folder that the image's HOME makes the user's own, so that no verb names it.
        panel("demo", "--init", "/panel/.config/vllm-sleep-tui", "--speed", SPEED)
        try:
            panel("start", "qwen")
            panel("switch", "phi")
            models = json.loads(panel("status", "--json"))["models"]
        finally:
            panel("stop", "--all", "--force")
        states = {model["name"]: model["state"] for model in models}
        if (states["qwen"], states["phi"]) != ("asleep", "awake"):
            sys.exit(f"after the switch: {states}")
        print("a start and a switch in it", flush=True)


if __name__ == "__main__":
    main()
