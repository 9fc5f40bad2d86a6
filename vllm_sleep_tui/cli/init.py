"""`init`: look around, write a config that fits what is there, say the next step."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from vllm_sleep_tui.cli.common import config_option, given_config, load_config, put_done, say
from vllm_sleep_tui.cli.moving import GATEWAY_PORT, Found, config_lines, read, read_running
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.schema import write_schema
from vllm_sleep_tui.config.types import CONFIG_NAME, SCHEMA_NAME
from vllm_sleep_tui.errors import PanelError, RefusedError, UsageError
from vllm_sleep_tui.files import is_taken, read_regular, trust, write_private
from vllm_sleep_tui.fleet.survey import (
    CachedModel,
    GpuReading,
    Surroundings,
    find_strangers,
    flag_tables,
    look_around,
)
from vllm_sleep_tui.paths import here, state_dir
from vllm_sleep_tui.units import gib

MAX_MODELS = 8
MAX_SOURCE = 2**20
"""Bytes of what `--from` reads."""
WEIGHTS_SHARE = 0.8
"""Of a GPU's memory: more weights than that leave no room for a KV cache."""
CPU_SHARE = 0.3
"""Of the RAM for each model on the CPU: vLLM's own 0.92 is seldom free, and nothing there makes room."""
EXAMPLE = "Qwen/Qwen3-0.6B"
SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_NAME}"


@click.command()
@click.option("--force", is_flag=True, help="Replace a config that is there.")
@click.option(
    "--schema", is_flag=True, help="Ask its vLLM for its flags, for editors; leaves the config as it is."
)
@click.option(
    "--from",
    "source",
    metavar="FILE|-|running",
    help="Make it of a llama-swap YAML, a compose file, a script, a line, vLLM's YAML, or what runs now.",
)
@config_option
@click.pass_context
def init(ctx: click.Context, force: bool, schema: bool, source: str | None) -> None:
    """Write a commented config of what is found on this machine.

    With --from it holds what a file, standard input (-) or the servers that run now start vLLM with; what
    could not be carried over is listed with the reason.

    Beside it lies a JSON schema, by which an editor completes and checks what is written. It knows the flags
    of the vLLM nearest to the one that is found; with --schema that one is asked itself.
    """
    if schema:
        renew_schema(load_config(ctx))
        return
    path = given_config(ctx) or Path(CONFIG_NAME)
    if is_taken(path) and not force:
        what = f"{path} is there already{', a link' if path.is_symlink() else ''}."
        raise RefusedError(what, "Replace it with --force, or write another with --config.")
    found = None if source is None else found_in(source)
    machine = look_around(here())
    for line in describe(machine):
        say(line)
    content = config_text(machine) if found is None else moved_text(machine, found)
    check_text(path, content)
    write_private(path, content.encode())
    for note in found.notes if found is not None else ():
        say(f"not carried over: {note}")
    loaded = load(path)
    # A program that a file, or another user's process, names is run when the person has looked at it.
    is_own = found is None or not any(moved.line.binary for moved in found.models)
    if found is not None:
        check_flags(loaded, may_ask=is_own)
    write_schema(path.with_name(SCHEMA_NAME), flag_tables(loaded, state_dir(), may_ask=False))
    if is_own:
        trust(loaded.found, loaded.agreement(), state_dir())
    put_done(str(path))
    named = "" if path == Path(CONFIG_NAME) else f" --config {path}"
    say(f"Next: look at {path}, then: vllm-sleep-tui{named} doctor")


def found_in(source: str) -> Found:
    """What `--from` names; raises PanelError."""
    if source == "running":
        return read_running([server.words for server in find_strangers()])
    if source == "-":
        return read(sys.stdin.read(MAX_SOURCE), "standard input")
    try:
        content = read_regular(Path(source), MAX_SOURCE, follow=True)
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}.", "Name another file.") from None
    return read(content.decode(errors="replace"), source)


def check_text(path: Path, content: str) -> None:
    """Raises UsageError if this would be no config: what is there stays."""
    try:
        made = tempfile.TemporaryDirectory(prefix=f".{CONFIG_NAME}-", dir=path.parent)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}.", "Name a file of a folder that you can write to."
        ) from None
    with made as folder:
        tried = Path(folder) / path.name
        write_private(tried, content.encode())
        try:
            load(tried)
        except PanelError as error:
            what = error.what.replace(str(tried), str(path))
            cure = f"{error.cure} Nothing was written. What it was made from may need a change.".lstrip()
            raise UsageError(what, cure) from None


def moved_text(machine: Surroundings, found: Found) -> str:
    """The config of what was found elsewhere."""
    best = machine.best_environment
    command = str(best.command) if best else "vllm"
    lines = [SCHEMA_LINE, f"vllm_command: [{_quoted(command)}]", "", "# One endpoint for all of them."]
    return "\n".join([*lines, f"gateway: {{port: {GATEWAY_PORT}}}", "", *config_lines(found)]) + "\n"


def check_flags(loaded: LoadedConfig, *, may_ask: bool) -> None:
    """Say which flags the vLLM of this config does not know, which is run for that if it may be."""
    for table in flag_tables(loaded, state_dir(), may_ask=may_ask):
        whose = f"vLLM {table.version}" + ("" if table.is_asked else ", the nearest that is known here")
        for name, model in loaded.config.models.items():
            for flag in model.args:
                if table.find(flag) is None:
                    near = table.nearest(flag)
                    hint = f"; the nearest is --{near}" if near else ""
                    say(f"{name}: --{flag} is not known to {whose}{hint}")


def renew_schema(loaded: LoadedConfig) -> None:
    """Write the schema beside a config, with the flags of every vLLM that it names."""
    say("Asking vLLM for its flags, which takes up to a minute the first time.")
    tables = flag_tables(loaded, state_dir(), may_ask=True)
    path = loaded.found.with_name(SCHEMA_NAME)
    write_schema(path, tables)
    put_done(str(path))
    for table in tables:
        knows = f"knows the {len(table.flags)} flags of vLLM {table.version}"
        say(f"It {knows}." if table.is_asked else f"It {knows}: the vLLM of this config could not be asked.")
    say(f"An editor takes it by this line in the config: {SCHEMA_LINE}")


def describe(machine: Surroundings) -> list[str]:
    """What there is, a line each."""
    lines = [
        f"vLLM   {environment.version or 'of unknown version'}  {environment.command}  ({environment.place})"
        for environment in machine.environments
    ] or ["vLLM   none found: install it in an environment of its own and name its binary in vllm_command"]
    lines += [f"GPU {gpu.index}  {gpu.name}  {gib(gpu.total_bytes)}" for gpu in machine.gpus] or [
        f"GPU    {machine.gpu_note or 'none found'}"
    ]
    lines += [f"Model  {model.name}  {gib(model.bytes)}" for model in machine.models] or [
        f"Model  none in the Hugging Face cache; {EXAMPLE} is written as an example"
    ]
    token = "there is one" if machine.token else "none; gated models need one (hf auth login)"
    return [*lines, f"Token  {token}"]


def config_text(machine: Surroundings, chosen: Sequence[CachedModel] = ()) -> str:
    """The config file for these surroundings, with comments; of the chosen models, else of those that fit."""
    best = machine.best_environment
    command = str(best.command) if best else "vllm"
    lines = [
        SCHEMA_LINE,
        "# The vllm binary of the environment that holds vLLM. What hides the process (conda run, uv run,",
        "# docker) cannot be watched: start such a server yourself and name it with `url:` below.",
        f"vllm_command: [{_quoted(command)}]",
        *(
            f"# also found: {other.command}  {other.version or ''}".rstrip()
            for other in machine.environments
            if other != best
        ),
        "",
        "models:",
        "  # Each model: its own name, and what `vllm serve` takes. More keys, all optional:",
        "  #   gpus: [0]                      GPU numbers of nvidia-smi; [] is vLLM on the CPU",
        "  #   level: auto                    1 keeps the weights in RAM, 2 drops them, none: stop and start",
        "  #   args: {max-model-len: 8192}    flags of `vllm serve` without the dashes",
        '  #   env: {HF_TOKEN: "${HF_TOKEN}"} environment; ${VAR} is taken from yours',
        "  #   port: 8001                     chosen free if left out",
        "  #   autostart: true                started by `vllm-sleep-tui serve`",
        "  #   idle: {sleep_after: 10m, stop_after: 2h}",
        "  #   url: http://127.0.0.1:8000     instead of `model:`, a server that you start yourself",
        '  #   api_key: "${BIG_KEY}"          its key, if it wants one; or api_key_file: FILE',
    ]
    for name, model in named_models(chosen or fitting(machine.models, machine.gpus)):
        lines += _model_lines(name, model, machine.gpus)
    return "\n".join(lines) + "\n"


def fitting(models: Sequence[CachedModel], gpus: Sequence[GpuReading]) -> list[CachedModel]:
    """The models that chat and fit, smallest first; an example if there are none."""
    able = (model for model in models if model.generates and gpus_needed(model.bytes, gpus) is not None)
    chosen = sorted(able, key=lambda model: model.bytes)[:MAX_MODELS]
    return chosen or [CachedModel(name=EXAMPLE, bytes=0, generates=True)]


def named_models(models: Sequence[CachedModel]) -> list[tuple[str, CachedModel]]:
    """Each model with a short name of its own."""
    named: dict[str, CachedModel] = {}
    for model in models:
        name = short_name(model.name)
        named[name if name not in named else short_name(model.name.replace("/", "-"))] = model
    return list(named.items())


def short_name(model: str) -> str:
    """A name for a model: the last part of its hub name in small letters."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.rsplit("/", 1)[-1].lower()).lstrip("._-")[:64] or "model"


def _model_lines(name: str, model: CachedModel, gpus: Sequence[GpuReading]) -> list[str]:
    size = f"{gib(model.bytes)} of weights" if model.bytes else "an example, fetched at its first start"
    lines = [f"  {_quoted(name)}:", f"    model: {_quoted(model.name)}  # {size}"]
    if not gpus:
        return [
            *lines,
            "    gpus: []  # no GPU was found: vLLM on the CPU, where sleeping frees no memory",
            "    args:",
            f"      gpu-memory-utilization: {CPU_SHARE:g}  # of the RAM, which vLLM takes on the CPU",
            "      enforce-eager: true  # else its start compiles for minutes; answers are faster then",
        ]
    count = gpus_needed(model.bytes, gpus) or 1
    lines.append(f"    gpus: {[gpu.index for gpu in gpus[:count]]}")
    if count > 1:
        lines.append(f"    args: {{tensor-parallel-size: {count}}}")
    return lines


def gpus_needed(weights: int, gpus: Sequence[GpuReading]) -> int | None:
    """How many GPUs (1, 2, 4, 8) these weights need, with a KV cache; 0 without any; None: too large."""
    if not gpus:
        return 0
    for count in (1, 2, 4, 8):
        sizes = [gpu.total_bytes for gpu in gpus[:count]]
        sized = [size for size in sizes if size is not None]
        if len(sizes) == count and (len(sized) < count or weights <= WEIGHTS_SHARE * min(sized) * count):
            return count
    return None


def _quoted(text: str) -> str:
    text = text.replace("$", "$$")  # in the config a variable would begin there
    return text if re.match(r"^[A-Za-z/][A-Za-z0-9_./-]*$", text) else "'" + text.replace("'", "''") + "'"
