"""`init --from`: a config made of what somebody already starts vLLM with.

llama-swap's and llmsnap's YAML, compose files, shell scripts, a pasted line, vLLM's own `--config` YAML and
the servers that run now: each comes down to command lines, which `engine` reads.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.survey import ServeLine, arguments_in, read_arguments

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|PWD|CRED|AUTH|COOKIE|BEARER|_PAT\Z", re.IGNORECASE)
"""Names of variables whose values are not copied."""
MAKER = r"(?<![\w/.-])(?:hf_|[sp]k[-_]|gh[opsu]_|xox[abp]-)"
NO_PATH = r"(?![\w-]|[/.]\w)"
OTHER_SIGN = r"\bglpat-[\w.-]{6}|://[^/@\s]+@|\beyJ\w{8}"
SECRET_SIGN = re.compile(rf"{MAKER}[\w-]{{16,}}{NO_PATH}|{OTHER_SIGN}")
"""In a flag's value: by a maker's sign with as much behind it as a key has, and no path; or in an address."""
SECRET_KEY = re.compile(
    r"(?:\A|[-_.])(?:api[-_]?key|hf[-_]token|auth[-_]token|access[-_]?(?:key|token)|secret"
    r"|secret[-_]\w*|password|passwd|credentials?)\Z|\A(?:key|token)\Z",
    re.IGNORECASE,
)
"""Names of flags, and of what is in their JSON, whose values are not copied."""
LEAST_KEY = 6
"""Characters; shorter ones are no key, or not worth one."""
SECRET_VALUE = re.compile(
    rf"{MAKER}[\w-]+{NO_PATH}|{OTHER_SIGN}|\A(?=[^\s/]*\d)(?=[^\s/]*[A-Za-z])[A-Za-z0-9+_=-]{{24,}}\Z"
)
"""Variables' values that look like a key, whatever the name: by a maker's sign, in an address, by chance."""
REFERENCE = re.compile(r"\$\{(\w+)\}")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][\w.]*)(?::?-([^}]*))?\}|([A-Za-z_]\w*))")
IMAGE = re.compile(r"(^|/)vllm[-_/]?(openai|cpu|omni)?")
CARRIED = frozenset({"cmd", "env", "aliases", "ttl", "proxy", "checkEndpoint", "name", "description"})
"""Of a model of llama-swap's: what is carried over, or is not needed here."""
CONTAINERS = frozenset({"docker", "podman", "nerdctl"})
GATEWAY_PORT = GatewayConfig().port
STARTERS = frozenset({"nohup", "exec", "nice", "setsid", "time"})
"""Before a command: a server here needs none of them."""


@dataclass(slots=True)
class Moved:
    """One model that was found."""

    name: str
    line: ServeLine
    env: dict[str, str] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    gpus: list[int] | None = None
    sleep_after: str | None = None


@dataclass(slots=True)
class Found:
    """What was found, and what could not be carried over, a line each."""

    models: list[Moved] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str | None, words: Sequence[str], env: Mapping[str, str], where: str) -> Moved | None:
        """A server by its command line; None, with a note, if it is none of vLLM's."""
        env, words = _without_assignments(words, dict(env))
        found = arguments_in(words)
        if found is None:
            # Its program alone: the rest may hold a key.
            self.notes.append(f"{where}: no `vllm serve`, so it is left out: {' '.join(words[:1])[:80]} …")
            return None
        binary, arguments = found
        before = [word for word in words[: _begin(words)] if word not in STARTERS]
        if before:
            self.notes.append(
                f"{where}: `{before[0][:60]} …` before vllm is left out: "
                "name the vllm binary of that environment in vllm_command"
            )
        return self.add_arguments(name, arguments, env, where, binary)

    def add_arguments(
        self,
        name: str | None,
        arguments: Sequence[str],
        env: Mapping[str, str],
        where: str,
        binary: str | None = None,
    ) -> Moved | None:
        """A server by what stands behind `vllm serve`."""
        try:
            line = read_arguments(arguments, binary)
        except ValueError as error:
            self.notes.append(f"{where}: {error}, so it is left out")
            return None
        if line.port and line.port in {GATEWAY_PORT, *(other.line.port for other in self.models)}:
            self.notes.append(f"{where}: port {line.port} has another here, so a free one is chosen")
            line.port = None
        given = [*([name] if name else []), *line.names] or [line.model.rstrip("/").rsplit("/", 1)[-1]]
        taken = {each for moved in self.models for each in (moved.name, *moved.aliases)}
        own = given[0] if given[0] not in taken else f"{given[0]}-{len(self.models) + 1}"
        moved = Moved(name=own, line=line, env=dict(env))
        moved.aliases = [each for each in dict.fromkeys(given[1:]) if each not in taken and each != own]
        if visible := moved.env.pop(VISIBLE, None):
            parts = visible.split(",")
            if all(part.strip().isdigit() for part in parts):
                moved.gpus = [int(part) for part in parts]
            else:
                self.notes.append(f"{where}: {VISIBLE}={visible}: write the indices as gpus: [0]")
        if line.has_key or moved.env.pop("VLLM_API_KEY", None) is not None:
            self.notes.append(f"{where}: its API key is not copied: write it to a file, `api_key_file: FILE`")
        unset = [n for n, value in moved.env.items() if set(REFERENCE.findall(value)) - os.environ.keys()]
        for variable in unset:
            del moved.env[variable]
            self.notes.append(f"{where}: {variable} is left out: what it is taken from is not set here")
        for variable in [name for name, value in moved.env.items() if is_secret(name, value)]:
            del moved.env[variable]
            self.notes.append(
                f"{where}: {variable} is not copied: servers take it from the panel's environment"
            )
        for flag in [flag for flag, value in line.args.items() if holds_key(flag, value)]:
            del line.args[flag]
            self.notes.append(
                f"{where}: --{flag} is left out, for it holds what looks like a key: "
                "write it with ${VAR} where the key stands"
            )
        self.notes += [f"{where}: {note}" for note in line.notes]
        self.models.append(moved)
        return moved


def is_secret(name: str, value: str) -> bool:
    """Whether a variable's value stays where it is."""
    return bool(SECRET.search(name) or SECRET_VALUE.search(value))


def holds_key(flag: str, value: Any) -> bool:
    """Whether a flag's value, or something in the JSON that it is, looks like a key."""
    if isinstance(value, list):
        return any(holds_key(flag, item) for item in value)
    if not isinstance(value, str):
        return False
    try:
        inside = json.loads(value)
    except (ValueError, RecursionError):
        inside = None
    if isinstance(inside, dict | list):
        return any(_looks_like_key(name, text) for name, text in _leaves(flag, inside))
    return _looks_like_key(flag, value)


def _looks_like_key(name: str, text: str) -> bool:
    if REFERENCE.fullmatch(text):
        return False
    # Not by chance: a revision looks like that, and so does the name of many a model.
    return bool(SECRET_SIGN.search(text) or (SECRET_KEY.search(name) and len(text) >= LEAST_KEY))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in JSON, each with the name that it stands under."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(key, item)


def read(text: str, source: str) -> Found:
    """What a file, or a pasted line, starts; raises UsageError if that is nothing."""
    found = Found()
    content = _yaml(text)
    if isinstance(content, dict):
        if isinstance(content.get("models"), dict):
            _from_swap(content, found)
        elif isinstance(content.get("services"), dict):
            _from_compose(content["services"], found)
        else:
            _from_flags(content, found, source)
    else:
        _from_script(text, found)
    if not found.models:
        listed = "; ".join(found.notes)
        raise UsageError(
            f"{source}: no `vllm serve` in it.{' ' + listed if listed else ''}",
            "Give a llama-swap YAML, a compose file, a shell script, a `vllm serve` line or vLLM's --config.",
        )
    return found


def read_running(commands: Iterable[Sequence[str]]) -> Found:
    """The servers that run now, by the words of their command lines."""
    found = Found()
    for words in commands:
        found.add(None, _literal(words), {}, "a running server")
    if not found.models:
        raise UsageError("No `vllm serve` runs here that was not started here.", "Give a file instead.")
    return found


def _yaml(text: str) -> Any:
    try:
        content = YAML(typ="safe", pure=True).load(text)
        return json.loads(json.dumps(content, default=str))
    except (YAMLError, ValueError, RecursionError):
        return None


# ── llama-swap, llmsnap ─────────────────────────────────────────────────────────────────────────────────────


def _from_swap(content: Mapping[str, Any], found: Found) -> None:
    macros = _texts_by_name(content.get("macros"))
    for key in content:
        if key in ("groups", "matrix"):
            found.notes.append(f"{key}: who stays awake together is decided by the measured memory here")
        elif key == "hooks":
            found.notes.append("hooks: write `autostart: true` at the models that are to be there at once")
        elif key not in (
            "models",
            "macros",
            "healthCheckTimeout",
            "startPort",
            "logLevel",
            "includeAliasesInList",
        ):
            found.notes.append(f"{key}: there is nothing like it here")
    for name, entry in content["models"].items():
        where = f"models.{name}"
        if not isinstance(entry, dict) or not isinstance(entry.get("cmd"), str):
            found.notes.append(f"{where}: no cmd, so it is left out")
            continue
        own = {**macros, **_texts_by_name(entry.get("macros")), "PORT": "0", "MODEL_ID": str(name)}
        command = entry["cmd"]
        for _ in range(5):  # macros may hold macros
            command = _expanded(command, own)
        words, environment = _words(_unfolded(command)), _environment(entry.get("env"))
        if _is_container(words):
            moved = _from_docker(words, environment, found, where, name=str(name))
        else:
            moved = found.add(str(name), words, environment, where)
        if moved is None:
            continue
        moved.line.port = None  # its own ports are handed out by llama-swap
        taken = {each for other in found.models for each in (other.name, *other.aliases)}
        for alias in _texts(entry.get("aliases")):
            if alias in taken - {moved.name, *moved.aliases}:
                found.notes.append(f"{where}.aliases: {alias} is already a name of another model")
            elif alias not in taken:
                moved.aliases.append(alias)
                taken.add(alias)
        if isinstance(entry.get("ttl"), int) and entry["ttl"] > 0:
            moved.sleep_after = f"{entry['ttl']}s"
        found.notes += [
            f"{where}.{key}: there is nothing like it here"
            for key in entry
            if key not in CARRIED | {"macros"}
        ]


def _expanded(text: str, values: Mapping[str, str]) -> str:
    """The text with the variables that are known filled in."""
    return VARIABLE.sub(lambda match: _filled(match, values), text)


def _filled(match: re.Match[str], values: Mapping[str, str]) -> str:
    name = match[1] or match[3] or ""
    if name in values:
        return values[name]
    if name.startswith("env."):
        return f"${{{name.removeprefix('env.')}}}"
    return match[2] if match[2] is not None else match[0]


# ── compose ─────────────────────────────────────────────────────────────────────────────────────────────────


def _from_compose(services: Mapping[str, Any], found: Found) -> None:
    for name, service in services.items():
        where = f"services.{name}"
        if not isinstance(service, dict) or not IMAGE.search(str(service.get("image", "")).split(":")[0]):
            found.notes.append(f"{where}: its image is none of vLLM's, so it is left out")
            continue
        command, entry = (_listed(_with_defaults(service.get(key))) for key in ("command", "entrypoint"))
        words = [*entry, *command]
        environment = _environment(_with_defaults(service.get("environment")))
        if arguments_in(words) is not None:
            moved = found.add(str(name), words, environment, where)
        else:
            moved = found.add_arguments(str(name), command, environment, where)
        if moved is None:
            continue
        moved.line.port = None  # of the container
        devices = _devices(service)
        if devices:
            moved.gpus = devices
        found.notes.append(f"{where}: it runs in a container; here the vllm of vllm_command runs it")
        if service.get("volumes"):
            found.notes.append(
                f"{where}.volumes: paths inside the container are to be changed to the real ones"
            )


def _with_defaults(value: Any) -> Any:
    """What compose would make of it without an environment: `${NAME:-this}`."""
    if isinstance(value, str):
        return _expanded(value, {})
    if isinstance(value, list):
        return [_with_defaults(part) for part in value]
    return {key: _with_defaults(part) for key, part in value.items()} if isinstance(value, dict) else value


def _devices(service: Mapping[str, Any]) -> list[int]:
    try:
        wanted = service["deploy"]["resources"]["reservations"]["devices"]
        ids = [str(number) for device in wanted for number in device.get("device_ids", ())]
    except (KeyError, TypeError, AttributeError):
        return []
    return [int(number) for number in ids if number.isdigit()]


# ── shell, a line, vLLM's own YAML ──────────────────────────────────────────────────────────────────────────


def _from_script(text: str, found: Found) -> None:
    variables: dict[str, str] = {}
    exported: dict[str, str] = {}
    for number, line in _lines(text):
        words = _words(_expanded(line, variables))
        if not words or words[0].startswith("#"):
            continue
        is_export = words[0] == "export"
        assigned, rest = _without_assignments(words[1:] if is_export else words, {})
        if not rest:
            variables |= assigned
            if is_export:
                exported |= assigned
        elif arguments_in(rest) is not None:
            found.add(None, words, exported, f"line {number}")
        elif "vllm" in line and IMAGE.search(line) and _is_container(words):
            _from_docker(words, exported, found, f"line {number}")


def _is_container(words: Sequence[str]) -> bool:
    program = [word for word in words if word != "sudo"][:1]
    return bool(program) and program[0].rsplit("/", 1)[-1] in CONTAINERS


def _from_docker(
    words: Sequence[str], env: Mapping[str, str], found: Found, where: str, name: str | None = None
) -> Moved | None:
    """`docker run … IMAGE ARGUMENTS`."""
    image = next((n for n, word in enumerate(words) if IMAGE.search(word.split(":")[0]) and n > 1), None)
    if image is None:
        found.notes.append(f"{where}: no image of vLLM's in it, so it is left out")
        return None
    inside, gpus = dict(env), None
    split = [part for word in words[:image] for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    for flag, value in pairwise(split):
        if flag in ("-e", "--env") and "=" in value:
            inside |= dict([value.split("=", 1)])
        elif flag == "--gpus":
            numbers = value.strip("\"'").removeprefix("device=").split(",")
            gpus = [int(number) for number in numbers] if all(map(str.isdigit, numbers)) else None
    arguments = _words(shlex.join(words[image + 1 :]))  # or a shell's, inside
    if arguments_in(arguments) is not None:
        moved = found.add(name, arguments, inside, where)
    else:
        moved = found.add_arguments(name, arguments, inside, where)
    if moved is not None:
        # `--gpus 1` is how many, and `device=1` is which.
        if gpus is not None and any("device=" in word for word in words[:image]):
            moved.gpus = gpus
        moved.line.port = None  # of the container
        found.notes.append(f"{where}: it runs in a container; here the vllm of vllm_command runs it")
    return moved


def _from_flags(content: Mapping[str, Any], found: Found, source: str) -> None:
    """vLLM's own `--config`."""
    words = []
    for key, value in content.items():
        if value is True:
            words.append(f"--{key}")
        elif value is False:
            words.append(f"--no-{key}")
        elif isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        elif value is not None:
            words.append(f"--{key}={value}")
    found.add_arguments(None, _literal(words), {}, source)


def _literal(words: Iterable[str]) -> list[str]:
    """Words in which no shell looks for variables, so that nothing here does."""
    return [word.replace("$", "$$") for word in words]


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a script with the numbers of their first lines; those with a backslash go on."""
    held, begun = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        begun = begun if held else number
        if stripped.endswith("\\"):
            held += stripped[:-1] + " "
            continue
        whole, held = held + stripped, ""
        for part in re.split(r"\s*(?:&&|;|(?<!&)&(?!&)|\|\|)\s*(?=[A-Za-z#]|$)", whole):
            if part:
                yield begun, part
    if held:
        yield begun, held


def _unfolded(command: str) -> str:
    """A command of several lines, with or without backslashes and comments, as one."""
    lines = (line.strip().removesuffix("\\") for line in command.splitlines())
    return " ".join(line for line in lines if not line.startswith("#"))


def _words(line: str) -> list[str]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return []
    if words[:1] and words[0].rsplit("/", 1)[-1] in ("sh", "bash") and "-c" in words[:3]:
        return _words(words[words.index("-c") + 1]) if len(words) > words.index("-c") + 1 else []
    return words


def _listed(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(part) for part in value]
    return _words(_unfolded(value)) if isinstance(value, str) else []


def _texts(value: Any) -> list[str]:
    """A list's items; one text alone is one item, and what is neither is none."""
    return [str(part) for part in value] if isinstance(value, list) else [value] * isinstance(value, str)


def _texts_by_name(value: Any) -> dict[str, str]:
    return {str(name): str(part) for name, part in value.items()} if isinstance(value, dict) else {}


def _environment(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {str(name): "" if part is None else str(part) for name, part in value.items()}
    pairs = [part.partition("=") for part in _texts(value)]
    return {name: text if equals else f"${{{name}}}" for name, equals, text in pairs}


def _without_assignments(words: Sequence[str], env: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """The `NAME=value` and `env` before a command go into the environment."""
    rest = list(words)
    while rest and (rest[0] == "env" or ASSIGNMENT.match(rest[0])):
        word = rest.pop(0)
        if word != "env":
            name, _, value = word.partition("=")
            env[name] = value
    return env, rest


def _begin(words: Sequence[str]) -> int:
    """Where vllm stands in a command."""
    for index, word in enumerate(words):
        if word.rsplit("/", 1)[-1] == "vllm":
            return index
        if word == "-m":
            return max(0, index - 1)
    return 0


# ── the config ──────────────────────────────────────────────────────────────────────────────────────────────


def config_lines(found: Found) -> list[str]:
    """The `models:` of a config; JSON is YAML, so texts are quoted as JSON has them."""
    lines = ["models:"]
    for moved in found.models:
        line = moved.line
        lines += [f"  {_text(moved.name)}:", f"    model: {_text(line.model)}"]
        if moved.aliases:
            lines.append(f"    aliases: [{', '.join(map(_text, moved.aliases))}]")
        gpus = moved.gpus if moved.gpus is not None else list(range(line.gpus))
        lines.append(f"    gpus: {gpus}")
        if line.binary is not None:
            lines.append(f"    vllm_command: [{_text(line.binary)}]")
        if line.port:
            lines.append(f"    port: {line.port}")
        if moved.sleep_after:
            lines.append(f"    idle: {{sleep_after: {moved.sleep_after}}}")
        lines += _mapping("args", line.args)
        lines += _mapping("env", moved.env)
    return lines


def _mapping(name: str, values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    return [f"    {name}:", *(f"      {_text(key)}: {_value(value)}" for key, value in values.items())]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return _text(value)


def _text(text: str) -> str:
    is_plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]*", text) and text.lower() not in (
        "true", "false", "yes", "no", "on", "off", "null", "none", "y", "n",
    )  # fmt: skip
    return text if is_plain else json.dumps(text, ensure_ascii=False)
