"""What vLLM and its libraries print when something is wrong, and what to tell a person.

The more particular a pattern, the earlier it stands. Named groups fill the sentences.
Recorded: those named in tests/unit/data; the others are messages in the sources of vLLM 0.24 to 0.33,
PyTorch, transformers and huggingface_hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Cause:
    """A pattern in a log, the reason it tells of, and the cure."""

    text: str
    reason: str
    cure: str
    planned: str = ""
    """The cure where `gpu-memory-utilization` is planned by the panel instead of set; empty: the same."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Compiled when it is first looked for: all of them take 30 ms, and few processes see a death."""
        return re.compile(self.text)


def _cause(pattern: str, reason: str, cure: str, planned: str = "") -> Cause:
    return Cause(pattern, reason, cure, planned)


API_PORT = r"Address already in use"
"""The server's own port, where nothing says that it is one inside vLLM."""
_INNER_CURE = "If `args:` or `env:` name it (`kv-events-config`, `master-port`, …), give each model its own."
HUB = r"(?:httpx|httpcore|requests|urllib3|huggingface_hub|Error retrieving file list|Local entry not found)"
"""How a line begins that tells of a talk with the hub."""
_NETWORK = (
    "Check the network, HF_ENDPOINT and the proxy; or download the model beforehand and set HF_HUB_OFFLINE=1."
)

_COMMAND_LINE = (
    _cause(
        r"error: unrecognized arguments: (?P<flags>.*)",
        "This vLLM does not know the flag {flags}.",
        "Correct `args:` of the model; `vllm serve --help=all` lists the flags of your version.",
    ),
    _cause(
        r"^vllm(?: serve)?: error: (?P<what>.*)",
        "vLLM does not accept its arguments: {what}.",
        "Correct `args:` of the model; `vllm serve --help=all` lists the flags of your version.",
    ),
    _cause(
        r"Sleep mode is not supported on current platform",
        "vLLM has no sleep mode on this platform (it has on CUDA, ROCm and XPU).",
        "Set `level: none`, or `gpus: []` for vLLM on the CPU.",
    ),
    _cause(
        r"ZMQError: Address already in use \(addr='(?P<inner>[^']+)'\)",
        "A port that vLLM uses inside is taken: {inner}.",
        _INNER_CURE,
    ),
    _cause(
        r"server socket has failed to listen.* port: (?P<inner>\d+).*EADDRINUSE",
        "A port that vLLM uses inside is taken: {inner}.",
        _INNER_CURE,
    ),
    _cause(
        r"(?P<inner>ZMQError|EADDRINUSE).*Address already in use|EADDRINUSE",
        "A port that vLLM uses inside is taken.",
        _INNER_CURE,
    ),
    _cause(
        API_PORT,
        "The port is taken by another program.",
        "Leave `port:` out so that a free one is chosen, or end that program.",
    ),
    _cause(
        r"AF_UNIX path too long|ipc path .* is longer than",
        "The temporary folder's path is too long for vLLM's sockets (107 characters).",
        "Set TMPDIR to a short folder before starting the panel.",
    ),
    _cause(
        r"User-specified max_model_len \((?P<wanted>\d+)\) is greater than the derived max_model_len "
        r"\(\D*(?P<most>\d+)?",
        "`max-model-len` {wanted} is more than the model was made for ({most}).",
        "Set `max-model-len` to {most} or less.",
    ),
    _cause(
        r"World size \((?P<wanted>\d+)\) is larger than the number of available GPUs \((?P<there>\d+)\)",
        "The model asks for {wanted} GPUs and is given {there}.",
        "List as many GPUs under `gpus:` as tensor and pipeline parallelism need.",
    ),
    _cause(
        r"(?P<what>Total number of attention heads \(\d+\) must be divisible by "
        r"tensor parallel size \(\d+\))",
        "{what}.",
        "Choose a `tensor-parallel-size` that divides the number of heads.",
    ),
)

_INSTALLATION = (
    _cause(
        r"No package metadata was found for vllm|No module named 'vllm'|No module named vllm",
        "vLLM is not properly installed in the environment of `vllm_command:`.",
        "Set `vllm_command:` to the `vllm` of the right environment, or install vLLM there.",
    ),
    _cause(
        r"(?:No such file or directory: '?ninja|Ninja is required)",
        "The `ninja` build tool, which vLLM compiles kernels with, was not found.",
        "Install it into vLLM's environment: `pip install ninja`.",
    ),
    _cause(
        r"driver on your system is too old|CUDA driver version is insufficient",
        "The NVIDIA driver is too old for this vLLM.",
        "Update the driver, or install a vLLM built for an older CUDA.",
    ),
    _cause(
        r"no kernel image is available for execution",
        "This vLLM has no kernels for this GPU: it is too old or too new for it.",
        "Install a vLLM and a PyTorch that support the GPU.",
    ),
    _cause(
        r"No CUDA GPUs are available|Failed to infer device type|no CUDA-capable device is detected",
        "vLLM finds no GPU.",
        "Check `nvidia-smi` and `gpus:` of the model; `gpus: []` is for vLLM on the CPU.",
    ),
    _cause(
        r"undefined symbol: (?P<symbol>\S+)|ImportError: (?P<library>lib\S+\.so\S*): cannot open",
        "vLLM's libraries do not fit together.",
        "Install vLLM into a fresh environment of its own, with the PyTorch that it asks for.",
    ),
    _cause(
        r"Expandable segments are not compatible with memory pool",
        "`expandable_segments:True` in PYTORCH_CUDA_ALLOC_CONF does not go with sleep mode.",
        "Remove it from the environment or from `env:` of the model.",
    ),
    _cause(
        r"No module named 'panel_guard'|ImportError.*panel_guard",
        "vLLM did not find the panel's guard.",
        "Use the `vllm` program itself in `vllm_command:`; wrappers may drop PYTHONPATH.",
    ),
)

_MODEL = (
    _cause(
        r"GatedRepoError|gated repo|Access to model (?P<model>\S+) is restricted"
        r"|Access denied\..* requires approval",
        "The model is gated: its owner wants an agreement first.",
        "Accept the terms on the model's page, then set HF_TOKEN to a token of that account.",
    ),
    _cause(
        r"Revision ?Not ?Found|Revision not found in|Invalid rev id",
        "The model has no such revision.",
        "Correct `revision` in `args:`, or leave it out.",
    ),
    _cause(
        r"Invalid credentials in Authorization header|Invalid user token|Client error '401 Unauthorized'",
        "The hub does not accept the token.",
        "Set HF_TOKEN to a valid one (`hf auth login`), or unset it if the model is public.",
    ),
    _cause(
        r"401 Client Error|Invalid username or password|RepositoryNotFoundError|Repository Not Found for url"
        r"|(?:Model|Repository) '[^']*' not found\.",
        "The hub does not know the model, or not without a valid token.",
        "Check the spelling of `model:`, and HF_TOKEN if it is private.",
    ),
    _cause(
        r"403 Forbidden|403 Client Error",
        "The token may not read this model.",
        "Set HF_TOKEN to one that may; a fine-grained token names the repositories that it opens.",
    ),
    _cause(
        r"429 Client Error|429 Too Many|Too Many Requests|Rate limited",
        "The hub refuses for now: too many requests came from here.",
        "Wait some minutes and start it again; with HF_TOKEN set more are allowed.",
    ),
    _cause(
        r"Server error '5\d\d|\b50\d Server Error|HTTP Error 50\d",
        "The hub is out of order.",
        "Start it again later, or download the model beforehand and set HF_HUB_OFFLINE=1.",
    ),
    _cause(
        rf"{HUB}.*(?:(?:Connect|Read|Write|Pool)Timeout|[Tt]imed out)",
        "The hub did not answer in time.",
        _NETWORK,
    ),
    _cause(
        r"We couldn't connect to|Failed to resolve|Name or service not known|Max retries exceeded with url"
        rf"|{HUB}.*(?:Connect(?:ion)?Error|Connection refused|Network is unreachable|No route to host"
        r"|name resolution|No address associated|CERTIFICATE_VERIFY_FAILED|ProxyError|ProtocolError"
        r"|IncompleteRead|Connection reset|peer closed connection)",
        "The hub cannot be reached.",
        _NETWORK,
    ),
    _cause(
        r"LocalEntryNotFoundError|Local entry not found|outgoing traffic has been disabled"
        r"|OfflineModeIsEnabled|offline mode is enabled|HF_HUB_OFFLINE",
        "The model is not in the local cache and the hub may not be asked.",
        "Download it first, or unset HF_HUB_OFFLINE.",
    ),
    _cause(
        r"Insufficient space in /dev/shm .*?: (?P<wanted>[\d.]+ \w+) required, (?P<free>[\d.]+ \w+) free",
        "The shared memory of the machine, /dev/shm, has {free} free, and {wanted} are needed.",
        "Make it larger (a container's `--shm-size 16g` or `--ipc=host`); remove what killed servers left.",
    ),
    _cause(
        r"No space left on device.*/dev/shm|/dev/shm.*No space left on device|No space left on device.*/psm_"
        r"|unable to write to file </?torch_|creating shared memory segment|unable to allocate shared memory",
        "The shared memory of the machine, /dev/shm, is full.",
        "Make it larger (a container's `--shm-size 16g` or `--ipc=host`); remove what killed servers left.",
    ),
    _cause(
        r"No space left on device|Not enough free disk space",
        "The disk is full.",
        "Free space where models, compile caches and logs lie.",
    ),
    _cause(
        r"Repo id must (?:use|be in the form)[^']*.*: '(?P<model>[^']*)'",
        "There is no model folder {model}, and it is no hub name either.",
        "Check the path in `model:`; relative ones count from where the panel was started.",
    ),
    _cause(
        r"Invalid repository ID or local directory specified: '(?P<model>\w[\w.-]*/[\w.-]+)'",
        "{model} is not in the local cache, and the hub was not asked or does not hold its config.json.",
        "Unset HF_HUB_OFFLINE if it is set; check the spelling of `model:`; a folder must hold config.json.",
    ),
    _cause(
        r"Invalid repository ID or local directory specified: '(?P<model>[^']*)'",
        "{model} holds no model: its config.json is missing.",
        "Point `model:` at the folder that holds config.json, or finish the download.",
    ),
    _cause(
        r"trust_remote_code|custom code which must be executed",
        "The model brings code of its own, which vLLM does not run unasked.",
        "If you trust it, add `trust-remote-code: true` to `args:`.",
    ),
    _cause(
        r"Model architectures \[(?P<name>[^\]]*)\] are not supported|has no vLLM implementation",
        "This vLLM does not support the model's architecture.",
        "Use a newer vLLM, or another model.",
    ),
    _cause(
        r"does not recognize this architecture",
        "The transformers library in vLLM's environment is too old for the model.",
        "Use a newer vLLM.",
    ),
    _cause(
        r"Error while deserializing header|SafetensorError|incomplete metadata",
        "A weights file of the model is damaged or incomplete.",
        "Delete it and download it again.",
    ),
)

_MACHINE = (
    _cause(
        r"Too many open files",
        "The server may not open as many files and sockets as it needs.",
        "Raise the limit where the panel is started: `ulimit -n 65536`, or LimitNOFILE= of its systemd unit.",
    ),
    _cause(
        r"can't start new thread|Thread creation failed|Resource temporarily unavailable",
        "The server may not start as many threads or processes as it needs.",
        "Raise `ulimit -u` or the container's `--pids-limit`, or end other programs.",
    ),
    _cause(
        r"Timed out waiting for (?:new )?engine core processes.*Waited (?P<seconds>\d+)s",
        "The engine was not ready within the {seconds} s that vLLM gives it.",
        "Raise VLLM_ENGINE_READY_TIMEOUT_S in `env:`; the log (key l) tells what took so long.",
    ),
    _cause(
        r"Duplicate GPU detected",
        "Two workers of the model were given the same GPU.",
        "List each GPU once under `gpus:`; on a MIG slice use one GPU.",
    ),
    _cause(
        r"NCCL.*(?:unhandled system error|ncclSystemError)|ncclSystemError",
        "The GPUs' communication (NCCL) failed on a call to the system, most often for too little /dev/shm.",
        "Give a container `--ipc=host` or `--shm-size 16g`; NCCL_DEBUG=INFO in `env:` tells more.",
    ),
    _cause(
        r"NCCL error|nccl(?:UnhandledCuda|Internal|Remote)Error|ncclInvalidUsage|DistBackendError"
        r"|Watchdog caught collective operation timeout",
        "The communication between the model's GPUs (NCCL) failed.",
        "Set NCCL_DEBUG=INFO in `env:` and look at the log; try NCCL_P2P_DISABLE=1, or one GPU.",
    ),
)

_MEMORY = (
    _cause(
        r"Free memory on device \S* ?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less "
        r"than desired GPU memory utilization \((?P<share>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
        "Not enough free GPU memory to start: {free} of {total} GiB are free, {wanted} GiB are asked for.",
        "Put other models to sleep, end other programs on the GPU, or lower `gpu-memory-utilization`.",
        "Put other models to sleep or end other programs on the GPU; its share of it is planned anew then.",
    ),
    _cause(
        r"Free memory on device",
        "Not enough free GPU memory to start.",
        "Put other models to sleep, end other programs on the GPU, or lower `gpu-memory-utilization`.",
        "Put other models to sleep or end other programs on the GPU; its share of it is planned anew then.",
    ),
    _cause(
        r"max seq len \((?P<length>\d+)\)[^\n]*?\((?P<need>[\d.]+) GiB KV cache is needed[^\n]*?"
        r"available KV cache memory \((?P<room>[\d.]+) GiB\)"
        r"(?:[^\n]*?estimated maximum model length is (?P<most>\d+))?",
        "`max-model-len` {length} needs {need} GiB of KV cache and {room} GiB are there.",
        "Set `max-model-len` to at most {most}, or raise `gpu-memory-utilization`.",
        "Set `max-model-len` to at most {most}, or take a model of its GPU out of the config: its share is "
        "planned so that the others fit beside it asleep.",
    ),
    _cause(
        r"larger than the available KV cache memory",
        "The KV cache has no room for one request of `max-model-len` tokens.",
        "Lower `max-model-len`, or raise `gpu-memory-utilization`.",
        "Lower `max-model-len`, or take a model of its GPU out of the config: its share is planned so that "
        "the others fit beside it asleep.",
    ),
    _cause(
        r"No available memory for the cache blocks",
        "After loading the weights no GPU memory is left for the KV cache.",
        "Raise `gpu-memory-utilization`, or use a smaller or quantised model.",
        "Use a smaller or quantised model, give it more GPUs, or take a model of its GPU out of the config: "
        "its share is planned so that the others fit beside it asleep.",
    ),
    _cause(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/[\d.]+ GiB\).*requested memory for kv "
        r"\((?P<wanted>[\d.]+) GiB\)",
        "The KV cache is to have {wanted} GiB of RAM and {free} GiB are free.",
        "Lower `kv-cache-memory-bytes` or VLLM_CPU_KVCACHE_SPACE.",
    ),
    _cause(
        r"Error in memory profiling",
        "GPU memory changed hands while vLLM was measuring it.",
        "Start it again when nothing else starts, sleeps or ends on that GPU.",
    ),
    _cause(
        r"Memory usage increased after sleeping",
        "Another program took GPU memory while the model fell asleep, which this vLLM does not survive.",
        "Restart the model; let nothing else start or wake on that GPU meanwhile.",
    ),
    _cause(
        r"CUDA Error: out of memory at \S*cumem|CUDA Error: invalid argument at \S*cumem",
        "The GPU had no room for the model to wake.",
        "Put other models to sleep or end other programs on the GPU, then restart the model.",
    ),
    _cause(
        r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY",
        "The GPU ran out of memory.",
        "Lower `gpu-memory-utilization` or `max-model-len`, or put other models to sleep first. Weights "
        "larger than the GPU need more GPUs (`tensor-parallel-size`) or a quantized checkpoint.",
        "Lower `max-model-len` or `max-num-seqs`, or put other models to sleep first. Weights larger than "
        "the GPU need more GPUs (`tensor-parallel-size`) or a quantized checkpoint.",
    ),
    _cause(
        r"DefaultCPUAllocator: can't allocate memory|Cannot allocate memory|^MemoryError",
        "The machine ran out of memory (RAM).",
        "Free RAM, use sleep level 2, or lower what the model needs.",
    ),
    _cause(
        r"illegal memory access",
        "The GPU reported an illegal memory access: the engine is lost.",
        "Restart the model; if it happens again after sleeping, use `level: none` and report it to vLLM.",
    ),
)

_INTERRUPTED = _cause(r"^KeyboardInterrupt", "The start was interrupted by a signal.", "Start it again.")

CAUSES: tuple[Cause, ...] = (*_COMMAND_LINE, *_INSTALLATION, *_MACHINE, *_MEMORY, *_MODEL, _INTERRUPTED)
"""Searched in the engine's own exception, then in all other exceptions."""

KILLED: tuple[Cause, ...] = (
    _cause(
        r"Worker proc (?P<name>\S+) died unexpectedly",
        "A worker process of the engine ({name}) was killed.",
        "Look for `Out of memory` in `dmesg`; otherwise look at the log (key l) and start it again.",
    ),
    _cause(
        r"engine core exited unexpectedly|Engine core proc \S+ died unexpectedly|EngineDeadError",
        "The engine process was killed.",
        "Look for `Out of memory` in `dmesg`; otherwise look at the log (key l) and start it again.",
    ),
)
"""Searched in the whole log when no exception tells more: a worker also dies of a failed start."""

SIGNALLED: tuple[Cause, ...] = (
    _cause(
        r"\[shutdown\] API server: shutdown triggered|trigger received signal=SIG",
        "Somebody asked the server to end with a signal.",
        "Start it again.",
    ),
)
"""Searched in the whole log after that: every proper end logs it too."""

VANISHED: tuple[Cause, ...] = (
    _cause(
        r"Engine core initialization failed|WorkerProc initialization failed",
        "The engine's process ended while it loaded and said nothing: it was killed, most often by the "
        "kernel because the machine's memory (RAM) ran out.",
        "Look for `Out of memory` in `dmesg`; free RAM, or lower what the model needs, then start it again.",
    ),
)
"""Searched last: words that point at a cause where there is none tell that nobody could say it."""
