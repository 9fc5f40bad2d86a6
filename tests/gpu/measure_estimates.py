"""What `advise` says of each model from its files alone beside what its launches measured.

    python tests/gpu/measure_estimates.py DIR [--checkpoints DIR]

DIR holds `box.yaml`, `footprints.json`, `machine.json` and `checkpoints/NAME/` (config.json, the headers of
the weights), as `box.py` leaves them in its `results`: nothing else is needed, no GPU either.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgspec
from gpu_config import PAIR

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.fleet.survey import read_once
from vllm_sleep_tui.sizing.checkpoint import INDEX
from vllm_sleep_tui.sizing.estimate import Estimate, checkpoint_of, estimate
from vllm_sleep_tui.sizing.footprints import Footprint, digest

GIB = 2**30
FP8 = "quantization", "fp8"
HEADER_LENGTH = 8
WHY_TIMES = (
    "Cold starts: disk and cores decide, and the estimate is one H100 box's. Of the same two models "
    "another box took 130 and 138 s where that one took 88 and 101."
)


def keep_headers(loaded: LoadedConfig, into: Path) -> None:
    """Copy of each model what an estimate reads: config.json, the index, the headers of the weights."""
    for name, model in loaded.config.models.items():
        source, target = checkpoint_of(model, loaded.path.parent).folder, into / name
        target.mkdir(parents=True, exist_ok=True)
        for file in ("config.json", INDEX, "modules.json"):
            if (source / file).is_file():
                shutil.copyfile(source / file, target / file)
        for path in source.glob("*.safetensors"):
            with path.open("rb") as file:
                length = file.read(HEADER_LENGTH)
                header = length + file.read(int.from_bytes(length, "little"))
            (target / path.name).write_bytes(header)


def as_long_as_they_were(checkpoint: Path, into: Path) -> Path:
    """A copy of a kept checkpoint whose files of weights have their length again, with nothing in it."""
    shutil.copytree(checkpoint, into)
    for path in into.glob("*.safetensors"):
        header = path.read_bytes()
        told = json.loads(header[HEADER_LENGTH:])
        end = max(
            (tensor["data_offsets"][1] for tensor in told.values() if "data_offsets" in tensor), default=0
        )
        os.truncate(path, len(header) + end)
    return into


def keep_machine(loaded: LoadedConfig, state: Path, path: Path) -> None:
    """Write down the GPU that the estimates are for."""
    gpu = read_once(loaded, state).gpus[0]
    path.write_text(json.dumps({"name": gpu.name, "total_bytes": gpu.total_bytes}))


def variants(loaded: LoadedConfig) -> Iterator[tuple[str, str, ModelConfig]]:
    """Every launch that the box makes: what it is called, the model's name, its config."""
    for name, model in loaded.config.models.items():
        yield name, name, model
        if name in PAIR:  # they are launched in FP8 as well
            quantised = msgspec.structs.replace(model, args={**model.args, FP8[0]: FP8[1]})
            yield f"{name} FP8", name, quantised


def rows(loaded: LoadedConfig, folder: Path, checkpoints: Path) -> list[dict[str, Any]]:
    """What was estimated and what was measured of every launch that was made."""
    machine = json.loads((folder / "machine.json").read_text())
    known = msgspec.json.decode((folder / "footprints.json").read_bytes(), type=dict[str, Footprint])
    found = []
    for shown, name, model in variants(loaded):
        key = next((key for key in known if key.startswith(f"{digest(model)}@")), None)
        if key is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            whole = as_long_as_they_were(checkpoints / name, Path(scratch, name))
            expected = estimate(
                msgspec.structs.replace(model, model=str(whole)),
                folder,
                total=machine["total_bytes"],
                gpu_name=machine["name"],
                version=key.partition("@")[2],
            )
        found += [{"model": shown, **each} for each in compared(expected, known[key], model)]
    return found


def compared(expected: Estimate, seen: Footprint, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """One row for each thing that is known of both."""
    times, starts = expected.times, seen.times.get("start", ())
    first = None if times is None else times.first_start
    if ServeArgs(model.args).is_eager and times is not None:
        first = times.start  # nothing is compiled
    pairs: Mapping[str, tuple[float | None, float | None]] = {
        "weights": (expected.weights_bytes, seen.weights),
        "VRAM awake": (expected.awake_per_gpu, max(seen.awake.values(), default=None)),
        "VRAM asleep": (expected.asleep_per_gpu, max(seen.asleep.values(), default=None)),
        "pinned RAM": (expected.pinned_bytes, seen.pinned),
        "first cold start": (first, starts[0] if starts else None),
        "later cold starts": (times.start if times else None, median(starts[1:])),
    }
    for what, (guess, truth) in pairs.items():
        if guess is not None and truth:
            yield {"what": what, "estimated": guess, "measured": truth, "off": 100 * (guess / truth - 1)}


def median(values: tuple[float, ...]) -> float | None:
    """The middle one; None without any."""
    return sorted(values)[len(values) // 2] if values else None


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| model | what | estimated | measured | off |", "|---|---|---|---|---|"]
    for each in found:
        shown = [in_units(each["what"], each[kind]) for kind in ("estimated", "measured")]
        lines.append(f"| {each['model']} | {each['what']} | {' | '.join(shown)} | {each['off']:+.1f} % |")
    return "\n".join([*lines, "", WHY_TIMES]) + "\n"


def in_units(what: str, value: float) -> str:
    """Seconds or GiB."""
    return f"{value:.0f} s" if what.endswith(("start", "starts")) else f"{value / GIB:.2f} GiB"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoints", type=Path, help="other folders of the models, by name")
    given = parser.parse_args()
    loaded = load(given.folder / "box.yaml")
    print(table(rows(loaded, given.folder, given.checkpoints or given.folder / "checkpoints")))


if __name__ == "__main__":
    main()
