"""The post's own figures, for the hardware nearest to a run's; always shown as theirs."""

from __future__ import annotations

from importlib.resources import files

import msgspec

from vllm_sleep_tui.bench.plan import Mode, Plan
from vllm_sleep_tui.bench.results import Machine
from vllm_sleep_tui.units import GIB


class Figures(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the post gives of one mode; seconds. Its switches by sleep are the wake alone."""

    total: float | None = None
    switch_a: float | None = None
    switch_b: float | None = None
    switch_either: tuple[float, float] | None = None
    """A range given for both models together."""
    inference_a: float | None = None
    inference_b: float | None = None


class Theirs(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """One machine of the post, with its ablations."""

    name: str
    up_to_gib: float | None = msgspec.field(name="up_to_gib")
    """The nearest for GPUs up to this size; None: for all others."""
    plain: dict[Mode, Figures]
    no_warmup: dict[Mode, Figures]
    fp8: dict[Mode, Figures]


class Post(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    source: str
    vllm: str
    pair: tuple[str, str]
    machines: tuple[Theirs, ...]


def read() -> Post:
    """The figures that come with this program."""
    content = files("vllm_sleep_tui.bench").joinpath("post.json").read_bytes()
    return msgspec.json.decode(content, type=Post)


def nearest(post: Post, machine: Machine) -> Theirs:
    """The post's machine whose GPU is most like the run's first, by memory."""
    total = next((gpu.total_bytes for gpu in machine.gpus if gpu.total_bytes), None)
    for each in post.machines:
        if each.up_to_gib is None or (total is not None and total <= each.up_to_gib * GIB):
            return each
    return post.machines[-1]


def variant(theirs: Theirs, plan: Plan) -> dict[Mode, Figures]:
    """The figures of the ablation that the run is: without warm-up, in FP8, or neither."""
    if not plan.warm_up:
        return theirs.no_warmup
    if any(each.argument == "quantization" and each.value == "fp8" for each in plan.overrides):
        return theirs.fp8
    return theirs.plain
