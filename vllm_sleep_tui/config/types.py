"""The config file: its types, and the units its values are written in.

Reading the file, with line numbers in every complaint, is `vllm_sleep_tui.config.load.load`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vllm_sleep_tui.config.parameters import Parameters

CONFIG_NAME = "vllm-sleep-tui.yaml"
SCHEMA_NAME = "vllm-sleep-tui.schema.json"

MODEL_NAME = r"^[^\s\x00-\x1f\x7f-]([^\x00-\x1f\x7f]{0,253}[^\s\x00-\x1f\x7f])?$"
"""A model's name is what clients call it by: a hub name, a tag such as qwen3:8b; a dash first is an option's.
Files are called after it by `paths.file_name`."""

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_DURATION = r"^([0-9]+(\.[0-9]+)?[smhd])+$"
_MEMORY = r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B$"

Level = Literal["auto", 0, 1, 2, "none"]
SleepBackend = Literal["auto", "stock"]
Restart = Literal["on-failure", "never"]
Port = Annotated[int, Meta(ge=1, le=65535)]
GpuIndex = Annotated[int, Meta(ge=0)]
Duration = Annotated[str, Meta(pattern=_DURATION, examples=["30s", "10m", "2h"])]
Memory = Annotated[str, Meta(pattern=_MEMORY, examples=["24GiB"])]


class IdleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long a model may be idle, counted from the end of its last answer."""

    sleep_after: Annotated[Duration | None, Meta(description="Then it sleeps.")] = None
    stop_after: Annotated[Duration | None, Meta(description="Then it is stopped.")] = None


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model of the file; its name is its key under ``models:``."""

    model: Annotated[str, Meta(description="A hub name or a folder, for `vllm serve`.")] | None = None
    """What `vllm serve` is given: a hub name or a folder."""
    url: Annotated[str, Meta(description="A server that somebody else started.")] | None = None
    """A server that somebody else started; attached, never started or ended."""
    vllm_command: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    """The vllm of this model, where it is another than the file's."""
    aliases: Annotated[tuple[str, ...], Meta(description="Other names that its server answers to.")] = ()
    """Names beside its own that requests may call the model by."""
    api_key: Annotated[str, Meta(description="The key of its server: ${VAR}, never the key.")] | None = None
    """The key itself, once it was read from its variable or from `api_key_file`."""
    api_key_file: Annotated[str, Meta(description="The file that holds the server's key.")] | None = None
    url_user: Annotated[str, Meta(description="Whose `url:` server may get the key, too.")] | None = None
    """A user of this machine besides this one and root; `*` is anybody."""
    gpus: Annotated[tuple[GpuIndex, ...], Meta(description="NVML indices; [] is vLLM on the CPU.")] = (0,)
    """NVML indices. Empty: vLLM on the CPU, where sleeping frees no memory."""
    level: Annotated[Level, Meta(description="Sleep level; none: stop and start instead.")] = "auto"
    sleep_backend: Annotated[SleepBackend, Meta(description="stock: vLLM's own sleep mode.")] = "auto"
    """auto: our own backend where it fits this vLLM, see docs/fast-switch.md."""
    kv_cache: Annotated[Memory, Meta(description="Kept for it on each GPU, whoever sleeps there.")] | None = (
        None
    )
    """What its KV cache is not cut below for sleepers that keep their weights in VRAM."""
    args: Annotated[dict[str, Any], Meta(description="Flags of `vllm serve` without the dashes.")] = {}
    """Flags of `vllm serve` by their long names without dashes, each with its text, or texts, as written."""
    env: Annotated[dict[str, str], Meta(description="Environment of this server; ${VAR} is filled in.")] = {}
    """With what `env_file` adds."""
    env_file: Annotated[tuple[str, ...], Meta(description="Files of lines NAME=value.")] = ()
    port: Annotated[Port, Meta(description="Chosen free if left out.")] | None = None
    autostart: Annotated[bool, Meta(description="Started by `serve`; the panel asks.")] = False
    idle: IdleConfig = IdleConfig()
    restart: Annotated[Restart, Meta(description="Of a server that died while it ran.")] = "on-failure"
    """Whether a server that died while it ran is started again; a start that failed never is."""

    @property
    def is_attached(self) -> bool:
        """Whether its server is somebody else's: neither started nor ended from here."""
        return self.url is not None

    def __repr__(self) -> str:
        """Name it without its key and the values of `env` and `args`, which may be secrets."""
        shown = {"model": self.model, "url": self.url, "gpus": self.gpus, "level": self.level}
        return f"ModelConfig({shown})"


class GatewayKeyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that clients of the gateway send, and what it is good for."""

    name: Annotated[str, Meta(min_length=1, description="What the panel and the log call its client.")]
    api_key: Annotated[str, Meta(description="${VAR}, never the key.")] | None = None
    """The key itself, once it was read from its variable or from `api_key_file`."""
    api_key_file: Annotated[str, Meta(description="The file that holds it.")] | None = None
    models: Annotated[tuple[str, ...], Meta(description="What it may ask; all if left out.")] = ()
    requests: Annotated[int, Meta(ge=1, description="At most so many at once.")] | None = None

    def __repr__(self) -> str:
        """Name it without the key."""
        return f"GatewayKeyConfig({self.name!r})"


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One endpoint for all models, of `serve` and the panel."""

    host: Annotated[str, Meta(description="An address of this machine alone.")] = "127.0.0.1"
    port: Port = 8800
    keys: tuple[GatewayKeyConfig, ...] = ()
    """Without any, whoever is on this machine may ask."""
    queue: Annotated[int, Meta(ge=1, description="Requests that may wait.")] = 200
    min_awake: Annotated[Duration | None, Meta(description="Left out: as long as its switch takes.")] = None
    """How long a model that was switched to stays, though others are waited for."""
    max_wait: Annotated[Duration | None, Meta(description="Then who waits goes first.")] = None
    """After so long nobody else's new requests are let before; left out: 30 s, or twice what the switch
    takes if that is longer."""
    give_up: Annotated[Duration, Meta(description="Then a request that waits is refused.")] = "10m"
    starts: Annotated[bool, Meta(description="Whether a request may start a stopped model.")] = True
    return_to: Annotated[str, Meta(description="The model to be awake when nothing is asked.")] | None = None
    return_after: Annotated[Duration, Meta(description="Without a request.")] = "10m"
    max_body: Annotated[Memory, Meta(description="The longest request.")] = "64MiB"


class SimulatedGpuConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU of the demo."""

    name: Annotated[str, Meta(min_length=1)]
    memory: Memory


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    models: dict[Annotated[str, Meta(pattern=MODEL_NAME)], ModelConfig]
    vllm_command: Annotated[tuple[str, ...], Meta(min_length=1)] = ("vllm",)
    gateway: GatewayConfig | None = None
    keep_conversations: Annotated[bool, Meta(description="Whether chats outlive the panel.")] = True
    """In `conversations.db` of the state folder."""
    presets: Annotated[dict[str, Parameters], Meta(description="Ways to ask, by name, for the chat.")] = {}
    simulated_gpus: tuple[SimulatedGpuConfig, ...] = ()


def parse_duration(text: str) -> float:
    """Seconds of a duration such as 30s, 10m, 2h or 1h30m; raises ValueError."""
    if not re.fullmatch(_DURATION, text):
        raise ValueError("a duration is a number and a unit, such as 30s, 10m or 2h")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9.]+)([smhd])", text))
    if seconds <= 0:
        raise ValueError("a duration must be more than zero")
    return seconds


def parse_bytes(text: str) -> int:
    """Bytes of an amount of memory such as 24GiB or 512MB; raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(i?)B", text)
    if match is None or (match[3] and not match[2]):
        raise ValueError("an amount of memory is a number and a unit, such as 24GiB")
    unit = 1024 if match[3] else 1000
    amount: int = round(float(match[1]) * unit ** _POWERS[match[2]])
    if amount <= 0:
        raise ValueError("an amount of memory must be more than zero")
    return amount
