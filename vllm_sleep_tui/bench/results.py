"""The file of a run: everything measured, raw, in one JSON document with a schema version.

It is replaced as a whole after each step, so that whatever ends the run leaves what was done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.bench.plan import STEPS, Mode, PassKey, Plan
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import private_dir, write_private
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.units import file_stamp

SCHEMA = 1
KIND = "vllm-sleep-tui bench"


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU of the pair."""

    index: int
    name: str
    total_bytes: int | None
    simulated: bool


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run was made; what cannot be found is None."""

    cpu: str | None
    cores: int | None
    ram_bytes: int | None
    kernel: str
    gpus: tuple[Gpu, ...]
    driver: str | None
    vllm: str | None = None
    torch: str | None = None
    vllm_python: str | None = None
    python: str
    """That of this program."""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was before the run, to be put back."""

    name: str
    state: State
    level: int | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory at one moment, in bytes; None: not known."""

    vram: dict[str, int | None]
    """By model."""
    ram: dict[str, int | None]
    """By model, its pinned pool included."""
    gpu_used: dict[str, int | None]
    """By GPU index, whoever holds it."""
    ram_available: int | None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One switch and the inference after it; seconds."""

    number: int
    """In its pass, from 0; step 0 has nobody to put to sleep."""
    leaving: str | None
    target: str
    began: float
    """UTC seconds."""
    switch: float
    """From the first call until the target takes requests."""
    phases: dict[str, float]
    """Parts of `switch`: the ledger of a sleep and a wake, or stop and the phases of a start."""
    question: str
    ttft: float | None
    """From the request to the first text; None if the answer was empty."""
    inference: float
    """From the request to the end of the answer."""
    tokens: int | None
    before: Memory
    after: Memory


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """One A→B→A→B→A→B."""

    key: PassKey
    began: float
    """UTC seconds."""
    steps: tuple[Step, ...] = ()
    refused: str | None = None
    """Why this mode cannot be had here, in a sentence."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left of it to do."""
        return len(self.steps) == STEPS or self.refused is not None

    @property
    def total(self) -> float | None:
        """Seconds of all switches and inferences; None while some are missing."""
        if len(self.steps) < STEPS:
            return None
        return sum(step.switch + step.inference for step in self.steps)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One initial load for the passes that sleep: start, warm-up, priming."""

    model: str
    began: float
    seconds: float
    """All of it, the warm-up's whole inference included."""
    phases: dict[str, float]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file."""

    schema: int = SCHEMA
    kind: str = KIND
    program: str
    """The version of this program."""
    began: float
    plan: Plan
    machine: Machine
    models: dict[str, dict[str, Any]]
    """The pair's entries in the config, as written there and with this run's changes."""
    found: tuple[Found, ...]
    restored: bool = False
    """Whether the models were put back after the last part of the run."""
    loads: tuple[Load, ...] = ()
    passes: tuple[Pass, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether every pass of the plan is done."""
        return self.next_key() is None

    def next_key(self) -> PassKey | None:
        """The first pass that is not done."""
        done = {each.key for each in self.passes if each.is_done}
        return next((key for key in self.plan.passes if key not in done), None)

    def of_mode(self, mode: Mode) -> list[Pass]:
        """The passes of one mode, whole or not."""
        return [each for each in self.passes if each.key.mode is mode]

    def with_pass(self, changed: Pass) -> Run:
        """With this pass in the place of the one of its key."""
        kept = tuple(each for each in self.passes if each.key != changed.key)
        return msgspec.structs.replace(self, passes=(*kept, changed))


def folder(state_dir: Path) -> Path:
    """Where results are kept unless a file is named; it need not exist."""
    return state_dir / "bench"


def new_file(state_dir: Path, plan: Plan) -> Path:
    """A file for a new result in that folder, which is made; raises PanelError."""
    return private_dir(folder(state_dir)) / f"{file_stamp()}-{plan.a}-{plan.b}.json"


def read(path: Path) -> Run:
    """The run in a file; raises UsageError if there is none that this version can read."""
    try:
        content = path.read_bytes()
        head = msgspec.json.decode(content, type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.", "Name a file that `bench run` wrote.") from None
    except msgspec.DecodeError:
        head = {}
    if head.get("kind") != KIND:
        raise UsageError(f"{path} is no result of `bench run`.", "Name a file that `bench run` wrote.")
    if head.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} has schema {head.get('schema')}; this version reads {SCHEMA}.",
            "Read it with the version that wrote it, or measure again.",
        )
    try:
        return msgspec.json.decode(content, type=Run)
    except msgspec.ValidationError as error:
        raise UsageError(f"{path} is damaged: {error}.", "Measure again.") from None


def write(path: Path, run: Run) -> None:
    """Replace the file of a run as a whole; raises OperationError."""
    write_private(path, msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")
