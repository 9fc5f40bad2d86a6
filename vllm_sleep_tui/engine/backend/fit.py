"""Whether this vLLM is one that the backend was made for: looked at when vLLM loads its plugins.

Everything of vLLM that is relied on is named here. The handle of an allocation is looked at when there is
one, before the first sleep.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from .plan import BLOCK

PROVEN = ("0.24", "0.25", "0.26")
"""The releases of vLLM with which it has been seen to work on a GPU; others keep vLLM's own sleep mode."""


def misfits(version: str, platform: Any, cumem: Any, allocation: Any) -> list[str]:
    """What is not as it must be, each as a sentence's end; nothing if all is well.

    `platform` is vLLM's current one, `cumem` its module of the sleep allocator (None if it cannot be
    imported), `allocation` its description of one allocation.
    """
    if not platform.is_cuda():
        return ["this vLLM does not run on an NVIDIA GPU"]
    if cumem is None or not getattr(cumem, "cumem_available", False):
        return ["vLLM's sleep allocator (vllm.device_allocator.cumem) is not there"]
    found = list(_missing(cumem, allocation))
    release = re.match(r"\d+\.\d+", version)
    if not found and (release is None or release[0] not in PROVEN):
        found = [f"vLLM {version} has not been seen with it on a GPU (seen: {', '.join(PROVEN)})"]
    return found


def _missing(cumem: Any, allocation: Any) -> Iterable[str]:
    for name in ("create_and_map", "unmap_and_release"):
        if parameters(getattr(cumem, name, None)) != ["allocation_handle"]:
            yield f"vllm.device_allocator.cumem has no {name}(allocation_handle)"
    allocator = getattr(cumem, "CuMemAllocator", None)
    for name, wanted in (
        ("sleep", ["self", "offload_tags"]),
        ("wake_up", ["self", "tags"]),
        ("get_instance", []),
    ):
        if parameters(getattr(allocator, name, None)) != wanted:
            yield f"vLLM's CuMemAllocator has no {name}({', '.join(wanted)})"
    fields = getattr(allocation, "__dataclass_fields__", {})
    if not {"handle", "tag"} <= set(fields):
        yield "vLLM's AllocationData has no handle and tag"


def parameters(function: Any) -> list[str] | None:
    """The names of a function's parameters; None if it is no function."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None


def misfits_of(allocations: Any) -> list[str]:
    """What is wrong with vLLM's allocations themselves: each is known by its address, in whole blocks."""
    if not isinstance(allocations, dict):
        return ["vLLM's CuMemAllocator keeps no pointer_to_data by address"]
    for address, found in allocations.items():
        handle = found.handle
        if not (
            isinstance(handle, tuple)
            and len(handle) == 4
            and all(isinstance(part, int) for part in handle)
            and handle[2] == address
            and handle[1] > 0
            and handle[1] % BLOCK == 0
            and isinstance(found.tag, str)
        ):
            return ["an allocation of vLLM is not described by device, size, address and cell"]
    return []
