"""What a model will need before it has run here: an estimate from its headers, and always called one.

The times are an H100's (vLLM 0.24, h100/bench.jsonl and h100/fp8.jsonl); elsewhere they are an order of
magnitude. The first launch replaces all of it by what is measured.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import msgspec

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.engine.versions import version_numbers
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing import budget
from vllm_sleep_tui.sizing.checkpoint import Checkpoint, Task, find_checkpoint, read_checkpoint
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD
from vllm_sleep_tui.sizing.model_files import shown
from vllm_sleep_tui.sizing.pinned_memory import Layout, Spread, spread
from vllm_sleep_tui.units import GIB

SECOND_RUNNER = frozenset(
    {
        "Qwen3ForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2MoeForCausalLM",
        "DeepseekV2ForCausalLM",
        "GraniteMoeForCausalLM",
    }
)
"""The architectures that vLLM 0.24 runs with its second model runner."""
SECOND_RUNNER_FOR_ALL = (0, 32)
"""From this version on all do (source)."""
LARGE_GPU = 70 * GIB
"""From here on vLLM's default is 1,024 sequences, else 256; A100s are excepted (source, 0.24 to 0.32)."""
ACTIVATIONS = int(1.5 * GIB)
"""What vLLM sets aside of its share beside weights and KV cache; 0.5 to 1.5 GiB measured on an H100."""
RESIDUE = int(0.79 * GIB)
"""What a sleeper leaves on one GPU whatever its size: CUDA's context, libraries, kernels.

This and the next two were fitted to twelve launches on H100s, 0.81 to 1.55 GiB, and are within 10 % of each.
FP8 left 0.08 GiB more once and 0.01 to 0.08 GiB less three times, so it has no term.
"""
RESIDUE_PER_HIDDEN = 48_000
"""Bytes for each number that a layer hands on: the buffers of a step outside of the pool that sleeps."""
RESIDUE_GRAPHS = int(0.53 * GIB)
"""CUDA graphs and compiled kernels; 0.39 to 0.56 GiB of it are the graphs by vLLM's log."""
RESIDUE_PARALLEL = int(2.7 * GIB)
"""On each of several GPUs, NCCL's buffers included: 2.73 (TP), 2.74 (EP), 2.34 and 2.67 GiB (PP) measured."""
START_SECONDS = 46.0
"""A start with a warm compile cache, without the loading: 47 s and 52 s measured with 1.1 and 7.3 GiB."""
START_SECONDS_PER_GIB = 0.9
FIRST_START_SECONDS = 92.0
"""The same without a compile cache: 88 to 103 s measured."""
PARALLEL_START = 1.6
"""Starts on two GPUs took 106 to 182 s."""
PIN_SECONDS_PER_GIB = 0.5
"""The first level 1 sleep, which allocates the pinned memory: 1.4 s for 3.0 GiB, 5.2 s for 10.1 measured."""
KV_SECONDS_PER_GIB = 0.003
"""Mapping the KV cache, a third of a wake."""


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that operations take."""

    start: float
    """A cold start with a warm compile cache."""
    first_start: float
    sleep1_first: float
    sleep1: float
    sleep2: float
    wake1: float
    wake2: float


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a model will need, in bytes and seconds; None is not known, and `unknown` says why."""

    architecture: str | None = None
    task: Task | None = None
    quantization: str | None = None
    parameters: int | None = None
    max_length: int | None = None
    checkpoint_bytes: int | None = None
    weights_bytes: int | None = None
    """As loaded, over all GPUs."""
    weights_per_gpu: int | None = None
    """On the fullest one."""
    kv_bytes_per_token: int | None = None
    """On each GPU, for a context within every layer's window."""
    context_bytes: int | None = None
    """KV cache of one context of the longest length that is served, on each GPU."""
    floor_per_gpu: int | None = None
    """The least VRAM that it can be awake in, with the KV cache of one context."""
    awake_per_gpu: int | None = None
    asleep_per_gpu: int | None = None
    pinned_bytes: int | None = None
    """RAM that level 1 takes for good, over all GPUs."""
    times: Times | None = None
    unknown: dict[str, str] = {}


def estimate(
    model: ModelConfig,
    base: Path,
    *,
    total: int | None = None,
    gpu_name: str = "",
    utilization: float | None = None,
    version: str | None = None,
) -> Estimate:
    """Estimate a model from the files that are here; `total` is the memory of each of its GPUs in bytes.

    `utilization` stands in for a share of its own, `version` is vLLM's. Raises UsageError if the model's
    files are not on this machine or cannot be read.
    """
    checkpoint = checkpoint_of(model, base)
    layout = layout_of(model, checkpoint, total=total, gpu_name=gpu_name, version=version)
    spread_out = _spread(checkpoint.folder, _stamp(checkpoint.folder), layout)
    args = ServeArgs(model.args)
    length = args.max_model_len or checkpoint.max_length
    per_gpu = _weights_per_gpu(checkpoint, layout, spread_out)
    context = _context(args, checkpoint, layout)
    figures = Estimate(
        architecture=checkpoint.architecture,
        task=checkpoint.task,
        quantization=args.quantization or checkpoint.quantization,
        parameters=checkpoint.parameters,
        max_length=length,
        checkpoint_bytes=checkpoint.weights_bytes,
        weights_bytes=checkpoint.weights_bytes if spread_out is None else spread_out.weights,
        weights_per_gpu=per_gpu,
        kv_bytes_per_token=checkpoint.kv_bytes(1, width=args.kv_width, ranks=layout.tensor_ranks),
        context_bytes=context,
        floor_per_gpu=_floor(per_gpu, context),
        asleep_per_gpu=_residue(model, checkpoint, layout),
        pinned_bytes=None if spread_out is None else spread_out.pinned,
        unknown=dict(checkpoint.unknown),
    )
    return _with_vram(figures, model, layout, total, utilization)


def checkpoint_of(model: ModelConfig, base: Path) -> Checkpoint:
    """What the model's files tell, without the tensors; raises UsageError if there are none to be read."""
    if model.model is None:
        raise UsageError("A server that others started has no files here.", "Ask who runs it.")
    folder = find_checkpoint(model.model, base, {**os.environ, **model.env})
    if folder is None and model.model.startswith(("/", ".", "~")):
        raise UsageError(f"{shown(model.model)}: holds no config.json.", "Name the folder of a model.")
    if folder is None:
        raise UsageError(
            f"{model.model}: not on this machine, neither a folder nor in the Hugging Face cache.",
            f"Fetch it first: hf download {model.model}",
        )
    return _facts(folder, _stamp(folder))


def estimated_weights(model: ModelConfig, base: Path) -> int | None:
    """Bytes of weights as loaded, over all GPUs, from headers only; None if the files are not here."""
    try:
        checkpoint = checkpoint_of(model, base)
    except UsageError:
        return None
    spread_out = _spread(checkpoint.folder, _stamp(checkpoint.folder), layout_of(model, checkpoint))
    return checkpoint.weights_bytes if spread_out is None else spread_out.weights


def context_of(model: ModelConfig, base: Path) -> int | None:
    """KV cache of one context of the longest length that is served, on each GPU; None if not known."""
    try:
        checkpoint = checkpoint_of(model, base)
    except UsageError:
        return None
    return _context(ServeArgs(model.args), checkpoint, layout_of(model, checkpoint))


def layout_of(
    model: ModelConfig,
    checkpoint: Checkpoint,
    *,
    total: int | None = None,
    gpu_name: str = "",
    version: str | None = None,
) -> Layout:
    """How vLLM will spread and store the model with these arguments."""
    args = ServeArgs(model.args)
    return Layout(
        tensor_ranks=args.tensor_ranks,
        pipeline_ranks=args.pipeline_ranks,
        quantised=(args.quantization or "").startswith("fp8") and checkpoint.quantization is None,
        full_width=args.is_full_width,
        sequences=_sequences(model, total, gpu_name) if _second_runner(model, checkpoint, version) else None,
    )


def times(weights: int, *, checkpoint_bytes: int, kv: int, pinned_bytes: int, gpus: int) -> Times:
    """Seconds on an H100 from bytes on one rank (`pinned_bytes`: over all)."""
    loaded, read = weights / GIB, checkpoint_bytes / GIB / gpus
    mapped = KV_SECONDS_PER_GIB * kv / GIB
    loading = START_SECONDS_PER_GIB * read
    spread = PARALLEL_START if gpus > 1 else 1.0
    return Times(
        start=START_SECONDS * spread + loading,
        first_start=FIRST_START_SECONDS * spread + loading,
        sleep1_first=0.05 + PIN_SECONDS_PER_GIB * pinned_bytes / GIB / gpus,
        sleep1=0.055 + 0.017 * loaded,
        sleep2=0.055,
        wake1=0.08 + 0.025 * loaded + mapped,
        wake2=0.3 + 0.13 * read + mapped,
    )


def _with_vram(
    figures: Estimate, model: ModelConfig, layout: Layout, total: int | None, utilization: float | None
) -> Estimate:
    """With what it holds on a GPU of `total` bytes, and the times that follow."""
    if figures.weights_per_gpu is None:
        return figures
    given = ServeArgs(model.args).kv_cache_memory_bytes
    awake = None
    if given is not None:
        awake = figures.weights_per_gpu + given + ACTIVATIONS + AWAKE_OVERHEAD
    elif total is not None:
        awake = budget.awake_estimate(budget.fixed_utilization(model) or utilization, total)
    fixed = figures.weights_per_gpu + ACTIVATIONS + AWAKE_OVERHEAD
    expected = times(
        figures.weights_per_gpu,
        checkpoint_bytes=figures.checkpoint_bytes or 0,
        kv=max(0, (awake or fixed) - fixed),
        pinned_bytes=figures.pinned_bytes or 0,
        gpus=layout.gpus,
    )
    return msgspec.structs.replace(figures, awake_per_gpu=awake, times=expected)


def _weights_per_gpu(checkpoint: Checkpoint, layout: Layout, spread_out: Spread | None) -> int | None:
    if spread_out is not None:
        return spread_out.fullest
    return None if checkpoint.weights_bytes is None else checkpoint.weights_bytes // layout.gpus


def _context(args: ServeArgs, checkpoint: Checkpoint, layout: Layout) -> int | None:
    """KV cache of one context of full length on each GPU."""
    length = args.max_model_len or checkpoint.max_length
    size = checkpoint.kv_bytes(length, width=args.kv_width, ranks=layout.tensor_ranks) if length else None
    return None if size is None else size // layout.pipeline_ranks


def _floor(weights: int | None, context: int | None) -> int | None:
    if weights is None or context is None:
        return None
    return weights + context + ACTIVATIONS + AWAKE_OVERHEAD


def _residue(model: ModelConfig, checkpoint: Checkpoint, layout: Layout) -> int:
    """What a sleeper leaves on each GPU."""
    if layout.gpus > 1:
        return RESIDUE_PARALLEL
    graphs = 0 if ServeArgs(model.args).is_eager else RESIDUE_GRAPHS
    return RESIDUE + RESIDUE_PER_HIDDEN * (checkpoint.hidden or 0) + graphs


def _second_runner(model: ModelConfig, checkpoint: Checkpoint, version: str | None) -> bool:
    """Whether vLLM's second model runner serves it, whose sampler sleeps with the weights."""
    if checkpoint.task is Task.EMBED:
        return False
    if (asked := model.env.get("VLLM_USE_V2_MODEL_RUNNER")) is not None:
        return asked == "1"
    for_all = version is not None and version_numbers(version) >= SECOND_RUNNER_FOR_ALL
    return for_all or checkpoint.architecture in SECOND_RUNNER


def _sequences(model: ModelConfig, total: int | None, gpu_name: str) -> int:
    given = ServeArgs(model.args).max_num_seqs
    is_large = total is not None and total >= LARGE_GPU and "a100" not in gpu_name.lower()
    return given or (1024 if is_large else 256)


def _stamp(folder: Path) -> tuple[int, ...]:
    """Changes when the folder's files do."""
    try:
        return (folder.stat().st_mtime_ns, (folder / "config.json").stat().st_mtime_ns)
    except OSError:
        return ()


# An operation and a panel ask often, and some models have a hundred thousand tensors: what is reckoned from
# them is kept for all models of a large config, the tensors themselves only until the next model is read.


@lru_cache(maxsize=1024)
def _facts(folder: Path, stamp: tuple[int, ...]) -> Checkpoint:
    return msgspec.structs.replace(_read(folder, stamp), tensors=())


@lru_cache(maxsize=1024)
def _spread(folder: Path, stamp: tuple[int, ...], layout: Layout) -> Spread | None:
    """How the model is spread; None if it has no headers."""
    checkpoint = _read(folder, stamp)
    return spread(checkpoint, layout) if checkpoint.tensors else None


@lru_cache(maxsize=2)
def _read(folder: Path, _: tuple[int, ...]) -> Checkpoint:
    return read_checkpoint(folder)
