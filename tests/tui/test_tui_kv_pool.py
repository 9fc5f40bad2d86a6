"""Memory that lies in a KV pool has a stretch of its own on the GPU's bar."""

from __future__ import annotations

import msgspec
from scripted_fleet import ScriptedFleet, gib

from vllm_sleep_tui.tui.drawing.bars import WOVEN
from vllm_sleep_tui.tui.widgets.memory import gpu_parts


def test_the_pool_is_named_and_is_nobody_elses() -> None:
    snapshot = ScriptedFleet().now
    colors = {model.name: "model-1" for model in snapshot.models}
    gpu = msgspec.structs.replace(snapshot.gpus[0], others=())
    ours = sum((model.vram_by_gpu or {}).get("0", 0) for model in snapshot.models)
    shown = msgspec.structs.replace(gpu, used_bytes=ours + gib(3.0), pool_bytes=gib(3.0))
    labels = {part.label: part.fill for part in gpu_parts(shown, snapshot.models, colors)}
    assert labels["KV pool 3.0"] == WOVEN
    assert not any("others" in label for label in labels)
    empty = msgspec.structs.replace(gpu, used_bytes=ours, pool_bytes=0)
    assert not any("KV pool" in part.label for part in gpu_parts(empty, snapshot.models, colors))
