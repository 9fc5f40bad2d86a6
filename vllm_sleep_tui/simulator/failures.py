"""Why a start fails, in the words and at the places of the real thing."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_sleep_tui.simulator.arguments import Options
from vllm_sleep_tui.simulator.behaviours import Fault, Faults
from vllm_sleep_tui.simulator.profiles import GIB
from vllm_sleep_tui.simulator.settings import Settings

ENGINE_FAILED = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
)
TRACEBACK = """Traceback (most recent call last):
  File "bin/vllm", line 8, in <module>
    sys.exit(main())
             ^^^^^^
  File "site-packages/vllm/entrypoints/cli/main.py", line 120, in main
    args.dispatch_function(args)
  File "site-packages/vllm/entrypoints/cli/serve.py", line 156, in cmd
    uvloop.run(run_server(args))"""


class StartFailed(Exception):  # noqa: N818 - a start that failed, told as the last lines of a traceback
    """The server cannot start; the text is the last line or lines of its traceback."""


def check_configuration(options: Options, settings: Settings, faults: Faults) -> None:
    """What the API server finds out before it starts an engine; raises StartFailed."""
    model = options.model
    _check_hub(model, options, settings, faults)
    if options.sleep_mode and not settings.visible_gpus():
        raise StartFailed(_invalid("Sleep mode is not supported on current platform."))
    world, there = options.tensor_parallel * options.pipeline_parallel, len(settings.visible_gpus())
    if settings.folder is not None and world > max(there, 1):
        raise StartFailed(
            _invalid(
                f"World size ({world}) is larger than the number of available GPUs ({there}) in this node."
            )
        )


def _check_hub(model: str, options: Options, settings: Settings, faults: Faults) -> None:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").exists():
            raise StartFailed(_invalid(_NO_CONFIG.format(model=model)))
    elif not re.fullmatch(r"(?:(?:s3|gs|az)://.+|\w[\w.-]*(/\w[\w.-]*)?)", model):
        raise StartFailed(
            "huggingface_hub.errors.HFValidationError: Repo id must use alphanumeric chars, '-', '_' or '.'. "
            f"The name cannot start or end with '-' or '.' and the maximum length is 96: '{model}'."
        )
    for fault, text in HUB_FAILURES.items():
        accepted = fault is Fault.TRUST_REMOTE_CODE and "trust_remote_code" in options.given
        if faults.has(fault) and not accepted:
            raise StartFailed(text.format(model=model))


_NO_CONFIG = """Invalid repository ID or local directory specified: '{model}'.
Please verify the following requirements:
1. Provide a valid Hugging Face repository ID.
2. Specify a local directory that contains a recognized configuration file.
   - For Hugging Face models: ensure the presence of a 'config.json'.
   - For Mistral models: ensure the presence of a 'params.json'.
"""
HUB_FAILURES = {
    Fault.GATED: (
        "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-simulated)\n\n"
        "Cannot access gated repo for url https://huggingface.co/{model}/resolve/main/config.json.\n"
        "Access to model {model} is restricted and you are not in the authorized list. "
        "Visit https://huggingface.co/{model} to ask for access."
    ),
    Fault.UNAUTHORIZED: (
        "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-simulated)\n\n"
        "Repository Not Found for url: https://huggingface.co/{model}/resolve/main/config.json.\n"
        "Please make sure you specified the correct `repo_id` and `repo_type`.\n"
        "If you are trying to access a private or gated repo, make sure you are authenticated."
    ),
    Fault.OFFLINE: (
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached "
        "snapshot folder for the "
        "specified revision on the local disk and outgoing traffic has been disabled. To enable "
        "repo look-ups and "
        "downloads online, pass 'local_files_only=False' as input."
    ),
    Fault.DISK_FULL: (
        "OSError: [Errno 28] No space left on device: 'models--{model}/blobs/simulated.incomplete'"
    ),
    Fault.TRUST_REMOTE_CODE: (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, The repository {model} contains custom code which must be executed to "
        "correctly load the "
        "model. You can inspect the repository content at https://hf.co/{model} .\n"
        "Please pass the argument `trust_remote_code=True` to allow custom code to be run. [type=value_error]"
    ),
}


def _invalid(text: str) -> str:
    return (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        f"  Value error, {text} [type=value_error, input_value=ArgsKwargs((), {{'model': ...}}), "
        "input_type=ArgsKwargs]\n    For further information visit "
        "https://errors.pydantic.dev/2.14/v/value_error"
    )


def why_no_reload(options: Options, minor: int) -> str | None:
    """What `reload_weights` raises where the loader, or LoRA before 0.28, cannot do it; None if it can."""
    loader = options.load_format.lower()
    if options.quantization == "bitsandbytes" and minor < 28:
        loader = "bitsandbytes"
    elif loader == "auto" and options.model.lower().startswith(("s3://", "gs://", "az://")):
        loader = "runai_streamer"
    if loader not in RELOADING and not (loader == "runai_streamer" and minor >= 32):
        return f"Model reloading with `{loader}` format"
    if "enable_lora" in options.given and minor < 28:
        return "'layers.0.self_attn.qkv_proj.weight'"  # a KeyError: LoRA's layers have other names
    return None


RELOADING = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt")


def too_little_free(*, free: int, total: int, utilization: float) -> StartFailed:
    """vLLM's check before it loads anything: the fraction is of the total."""
    return StartFailed(
        f"ValueError: Free memory on device cuda:0 ({free / GIB:.2f}/{total / GIB:.2f} GiB) on "
        f"startup is less than "
        f"desired GPU memory utilization ({utilization:g}, {utilization * total / GIB:.2f} GiB). "
        f"Decrease GPU memory "
        "utilization or reduce GPU memory used by other processes."
    )


def cuda_out_of_memory(*, asked: int, total: int, free: int) -> StartFailed:
    """torch's error, while the weights load or the graphs are captured."""
    return StartFailed(
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {asked / GIB:.2f} GiB. "
        f"GPU 0 has a total "
        f"capacity of {total / GIB:.2f} GiB of which {free / GIB:.2f} GiB is free."
    )


def no_cache_blocks() -> StartFailed:
    """The weights leave nothing within the utilization."""
    return StartFailed(
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine."
    )


def cache_too_small(*, max_model_len: int, needed: int, available: int, fits: int) -> StartFailed:
    """Not one request of the full length fits (log-kv-cache-too-small.txt)."""
    return StartFailed(
        f"ValueError: To serve at least one request with the model's max seq len ({max_model_len}), "
        f"({needed / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache memory "
        f"({available / GIB:.2f} GiB). Based on the available memory, the estimated maximum "
        f"model length is {fits}. "
        "Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
        "backend) or decreasing "
        "`max_model_len` when initializing the engine."
    )


def profiling_disturbed(*, before: int, now: int) -> StartFailed:
    """Another process gave memory back while this one measured."""
    return StartFailed(
        f"AssertionError: Error in memory profiling. Initial free memory {before / GIB:.2f} GiB, "
        f"current free memory "
        f"{now / GIB:.2f} GiB. Another process released GPU memory meanwhile."
    )
