"""Which of vLLM's loaders can read a model's weights again, which level 2 needs at every wake."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.engine.versions import NEWEST_KNOWN, Release, release_of

CANNOT_RELOAD = "Model reloading with"
"""In vLLM's answer to `reload_weights` where its loader has no way to do it (0.24 to 0.32, source)."""
NEVER: Release = (10**6, 0)
RELOADS_SINCE: Mapping[str, Release] = {
    **dict.fromkeys(
        ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt"), (0, 0)
    ),
    "runai_streamer": (0, 32),
    "bitsandbytes": (0, 28),  # a loader of its own until then, the default one since
    "dummy": NEVER,
    "ipc_cache": NEVER,
    "modelexpress": NEVER,
    "runai_streamer_sharded": NEVER,
    "sharded_state": NEVER,
    "tensorizer": NEVER,
}
"""The vLLM from which a loader has `get_all_weights` (sources of 0.24, 0.26 to 0.32). One that is not here is
a plugin's, which has it only if its author thought of level 2."""
LORA_SINCE: Release = (0, 28)
"""From here on a reload knows LoRA's layers, and adapters are read again at their next use; before, it ends
in a KeyError (sources of 0.24 to 0.32)."""
OBJECT_STORES = ("s3://", "gs://", "az://")


def loader(model: str, args: Mapping[str, Any], quantization: str | None = None) -> str:
    """The loader that vLLM takes; `quantization` is what the checkpoint's config.json names, if anything."""
    asked = ServeArgs(args)
    chosen = asked.load_format
    if "bitsandbytes" in (asked.quantization, quantization):
        return "bitsandbytes" if chosen in ("auto", "bitsandbytes") else chosen
    return "runai_streamer" if chosen == "auto" and model.lower().startswith(OBJECT_STORES) else chosen


def why_no_reload(
    model: str, args: Mapping[str, Any], version: str | None, quantization: str | None = None
) -> str | None:
    """Why level 2 could not bring this model back on that vLLM, in words; None if it can.

    A version that is not known counts as the newest.
    """
    release = release_of(version or "") or NEWEST_KNOWN
    name = loader(model, args, quantization)
    since = RELOADS_SINCE.get(name)
    if name == "dummy":
        return "dummy weights cannot be loaded again"
    if since is None:
        return f"vLLM's loaders that can load weights again do not include `{name}`"
    if release < since:
        from_ = "" if since == NEVER else f" before {since[0]}.{since[1]}"
        return f"vLLM's loader `{name}` cannot load weights again{from_}"
    if release < LORA_SINCE and ServeArgs(args).has_lora:
        return "vLLM cannot load the weights of a model with LoRA again before 0.28"
    return None
