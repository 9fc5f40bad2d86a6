"""What an editor is told of a config: good files pass its schema, and bad ones are marked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from tests.command_lines import lines
from vllm_sleep_tui.config.flags import FlagTable, shipped_table
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.schema import schema
from vllm_sleep_tui.config.types import SCHEMA_NAME
from vllm_sleep_tui.engine.argv import check_args
from vllm_sleep_tui.errors import UsageError

ASKED = FlagTable("0.32.0", shipped_table("0.32.0").flags, is_asked=True)
EDITOR = Draft202012Validator(schema([ASKED]))


def marked(text: str) -> bool:
    """Whether an editor marks something in a file."""
    return not EDITOR.is_valid(YAML(typ="safe", pure=True).load(text))


def refused(folder: Path, text: str) -> bool:
    """Whether the reader, or the check of the flags before a start, refuses it."""
    path = folder / "models.yaml"
    path.write_text(text)
    try:
        models = load(path).config.models.values()
    except UsageError:
        return True
    return any(list(check_args(model.args, ASKED)) for model in models)


def with_args(args: str) -> str:
    return f"models: {{a: {{model: x/y, gpus: [0, 1, 2, 3], args: {args}}}}}"


GOOD = [
    "{max-model-len: 8192}",
    "{max_model_len: 32k, tp: 2, -pp: 1, --seed: -3}",
    "{max-model-len: auto, gpu-memory-utilization: 0.9, kv-cache-dtype: fp8}",
    "{enforce-eager: true, trust-remote-code: yes, enable-prefix-caching: off, no-enable-log-requests: True}",
    "{compilation-config: {mode: 3}, compilation-config.pass_config.fuse_allreduce_rms: false, O: 3}",
    "{-cc.mode: NONE, speculative-config: '{}', hf-overrides: {a: [1, {b: null}]}}",
    '{revision: 12e4567, chat-template: "${HOME}/x.jinja", max-num-seqs: "${SET_BY_NOBODY:-8}"}',
    "{max-num-seqs: null, lora-modules: [a=./a, {name: b, path: ./b}], tool-call-parser: mine}",
    "[--max-model-len, 8192, --enforce-eager]",
]
BAD = [
    "{max-modle-len: 8192}",
    "{max-model-len: much}",
    "{max-model-len: [1, 2]}",
    "{tensor-parallel-size: 1.5}",
    "{enforce-eager: sometimes}",
    "{kv-cache-dtype: quick}",
    "{gpu-memory-utilization: high}",
    "{host: 0.0.0.0}",
    "{served_model_name: b}",
    "{--api-key: k}",
    "{no-enable-sleep-mode: true}",
    "{revision: [a, b]}",
    "7",
]


@pytest.mark.parametrize("args", GOOD)
def test_what_may_be_written_is_not_marked(tmp_path: Path, args: str) -> None:
    assert (refused(tmp_path, with_args(args)), marked(with_args(args))) == (False, False)


@pytest.mark.parametrize("args", BAD)
def test_what_would_be_refused_is_marked(tmp_path: Path, args: str) -> None:
    assert (refused(tmp_path, with_args(args)), marked(with_args(args))) == (True, True)


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("models: {a: {url: 'http://127.0.0.1:1', api_key: '${KEY_OF_A}'}}", False),
        ("models: {a: {url: 'http://127.0.0.1:1', api_key: sk-1}}", True),
        ("models: {a: {model: x, url: 'http://127.0.0.1:1'}}", True),
        ("models: {a: {model: x, modle: y}}", True),
        ("models: {a: {model: x, level: 3}}", True),
        ("models: {a: {model: x, idle: {sleep_after: soon}}}", True),
        ("models: {a: {model: x, env: [HF_TOKEN], env_file: .env, idle: {sleep_after: 10m}}}", False),
        ("models: {}", True),
    ],
)
def test_the_other_keys_are_looked_at_too(text: str, bad: bool) -> None:
    assert marked(text) is bad


def test_published_command_lines_are_not_marked() -> None:
    """Those that this vLLM reads: a flag of another version is to be marked."""
    loose = Draft202012Validator(schema([FlagTable("0.32.0", ASKED.flags)]))
    for line in lines():
        args = YAML(typ="safe", pure=True).load(line.args or "{}")
        assert not list(loose.iter_errors({"models": {"a": {"model": "x/y", "args": args}}})), line.args


def test_every_flag_can_be_completed_and_tells_its_values() -> None:
    known = schema([ASKED])["$defs"]["Args"]["properties"]
    assert {"max-model-len", "load-format", "enforce-eager"} <= set(known)
    assert not {"host", "port", "api-key", "enable-sleep-mode"} & set(known)
    assert {"auto", "fp8"} <= set(known["kv-cache-dtype"]["anyOf"][0]["enum"])


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_sleep_tui", *arguments],
        cwd=folder,
        env=os.environ | {"XDG_STATE_HOME": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def a_vllm(folder: Path, flags: list[dict[str, Any]]) -> Path:
    """An environment whose Python answers as vLLM's parser would."""
    folder.mkdir()
    answer = json.dumps({"version": "9.9.9", "flags": flags})
    (folder / "python3").write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    vllm = folder / "vllm"
    vllm.write_text(f"#!{folder / 'python3'}\n")
    for file in folder.iterdir():
        file.chmod(0o755)
    return vllm


def test_init_asks_the_vllm_of_a_config_for_the_schema_beside_it(tmp_path: Path) -> None:
    vllm = a_vllm(tmp_path / "env", [{"names": ["--only-here", "-oh"], "type": "int", "help": "How many."}])
    config = tmp_path / "mine.yaml"
    content = json.dumps({"vllm_command": [str(vllm)], "models": {"a": {"model": "x/y", "gpus": []}}})
    config.write_text(content)
    refused = run(tmp_path, "init", "--schema")
    assert refused.returncode == 2  # there is no vllm-sleep-tui.yaml here
    done = run(tmp_path, "--config", str(config), "init", "--schema")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / SCHEMA_NAME)
    assert "flags of vLLM 9.9.9" in done.stderr
    assert f"# yaml-language-server: $schema={SCHEMA_NAME}" in done.stderr
    assert config.read_text() == content
    editor = Draft202012Validator(json.loads((tmp_path / SCHEMA_NAME).read_text()))
    file = json.loads(content)
    for args, good in (({"only-here": 1}, True), ({"oh": 2}, True), ({"only-here": "x"}, False)):
        file["models"]["a"]["args"] = args
        assert editor.is_valid(file) is good
    file["models"]["a"]["args"] = {"seed": 1}
    assert not editor.is_valid(file)
    assert "How many." in (tmp_path / SCHEMA_NAME).read_text()


def test_what_nobody_agreed_to_is_not_asked_for_its_flags(tmp_path: Path) -> None:
    vllm = a_vllm(tmp_path / "env", [{"names": ["--only-here"], "type": "int"}])
    config = {"vllm_command": [str(vllm)], "models": {"a": {"model": "x/y", "gpus": []}}}
    (tmp_path / "vllm-sleep-tui.yaml").write_text(json.dumps(config))
    done = run(tmp_path, "init", "--schema")
    assert done.returncode != 0
    assert "nobody has agreed" in done.stderr
    assert not (tmp_path / SCHEMA_NAME).exists()


def test_the_demos_config_is_good_by_its_own_schema(tmp_path: Path) -> None:
    done = run(tmp_path, "demo", "--init", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    editor = Draft202012Validator(json.loads((tmp_path / "demo" / SCHEMA_NAME).read_text()))
    config = YAML(typ="safe", pure=True).load(tmp_path / "demo/vllm-sleep-tui.yaml")
    assert not list(editor.iter_errors(config))
    config["models"][next(iter(config["models"]))]["args"] = {"max-modle-len": 1}
    assert not editor.is_valid(config)
