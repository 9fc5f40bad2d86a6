"""`init --from`: what others start vLLM with becomes our config; its command lines stay what they were."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.test_engine_argv import SPEC
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.engine.argv import serve_argv

DATA = Path(__file__).parent / "data" / "moving"
OURS = {"--host", "--port", "--api-server-count", "--middleware", "--disable-access-log-for-endpoints"}

EXPECTED: dict[str, dict[str, str]] = {
    "swap-groups.yaml": {
        "qwen3:8b": "Qwen/Qwen3-8B --max-model-len 8192 --gpu-memory-utilization 0.85 "
        "--enable-auto-tool-choice --tool-call-parser hermes"
    },
    "swap-wrapper.yaml": {
        "coder model": "Qwen/Qwen2.5-Coder-32B-Instruct-AWQ --tensor-parallel-size 2 "
        "--quantization awq_marlin "
        """--hf-overrides '{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}'"""
    },
    "snap-sleep.yaml": {"phi": "microsoft/phi-4 --no-enable-prefix-caching"},
    "compose-one.yaml": {"chat": "mistralai/Mistral-7B-Instruct-v0.3 --max-model-len 16384 --dtype bfloat16"},
    "compose-two.yaml": {
        "embed": "BAAI/bge-m3 --runner pooling --max-num-seqs 64",
        "big": """Qwen/Qwen3-32B-FP8 --tensor-parallel-size 2 --limit-mm-per-prompt '{"image": 2}'""",
    },
    "start.sh": {
        "Qwen3-0.6B": "Qwen/Qwen3-0.6B --max-model-len 4096 --enforce-eager",
        "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct --max-num-seqs 16",
    },
    "compose-defaults.yaml": {
        "gemma": "google/gemma-3-4b-it --gpu-memory-utilization 0.9 --tensor-parallel-size 1"
    },
    "swap-docker.yaml": {
        "devstral": "mistralai/Devstral-Small-2505 --tokenizer-mode mistral --tensor-parallel-size 2 "
        "--max-model-len 48080",
        "embedder": "BAAI/bge-m3 --runner pooling",
    },
    "docker.sh": {"Qwen3-4B": "Qwen/Qwen3-4B --max-model-len 32768 --kv-cache-dtype fp8"},
    "line.txt": {
        "mine": "MODELS/mine --enforce-eager --lora-modules a=MODELS/../a b=MODELS/../b --enable-lora "
        "--max-lora-rank 32 --tensor-parallel-size 2"
    },
    "uv-run.sh": {"gemma-3-4b-it": "google/gemma-3-4b-it --max-model-len 8k --trust-remote-code"},
    "serve.yaml": {
        "small": "Qwen/Qwen3-1.7B --max-model-len 8192 --no-enable-prefix-caching "
        """--compilation-config '{"mode": 3}'"""
    },
}
"""What each of them started, in the words of its author; paths made absolute."""


def run_init(folder: Path, *words: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_sleep_tui", "init", *words]
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, timeout=120)


def moved(folder: Path, name: str) -> tuple[LoadedConfig, str]:
    """The config that is made of a file, and what was said."""
    done = run_init(folder, "--from", str(DATA / name))
    assert done.returncode == 0, done.stderr
    return load(folder / "vllm-sleep-tui.yaml"), done.stdout + done.stderr


def words_of(loaded: LoadedConfig, name: str) -> Counter[str]:
    """The command line of a model as it would be started, without what every server gets."""
    model = loaded.config.models[name]
    spec = replace(SPEC, model=model.model or "", served_name=name, args=model.args, utilization=None)
    argv = serve_argv(replace(spec, sleep_mode=False))
    kept = argv[2:3]
    position = argv.index("--served-model-name") + 2
    while position < len(argv):
        if argv[position] in OURS:
            position += 2
            continue
        kept.append(argv[position])
        position += 1
    return Counter(kept)


@pytest.mark.parametrize("name", EXPECTED)
def test_its_command_lines_stay_what_they_were(tmp_path: Path, name: str) -> None:
    loaded, _ = moved(tmp_path, name)
    assert loaded.config.models.keys() == EXPECTED[name].keys()
    for model, line in EXPECTED[name].items():
        wanted = shlex.split(line)
        where = str(tmp_path / "models")
        plain = [word.replace("MODELS/..", ".").replace("MODELS", where) for word in wanted]
        assert words_of(loaded, model) == Counter(plain), model


def test_every_fixture_is_looked_at() -> None:
    assert {file.name for file in DATA.iterdir()} == EXPECTED.keys()


def test_names_gpus_and_timers_come_along_and_what_does_not_is_said(tmp_path: Path) -> None:
    loaded, said = moved(tmp_path, "swap-groups.yaml")
    model = loaded.config.models["qwen3:8b"]
    assert model.aliases == ("gpt-4o", "small")
    assert model.gpus == (1,)
    assert model.idle.sleep_after == "600s"
    assert model.env == {"HF_HOME": "/data/hub"}
    assert model.vllm_command == ("/srv/vllm/bin/vllm",)
    assert loaded.config.gateway is not None
    for part in ("groups", "HF_TOKEN is not copied", "cmdStop", "models.llama: no `vllm serve`"):
        assert f"{part}" in said, part
    assert "hf_made_up" not in said + (tmp_path / "vllm-sleep-tui.yaml").read_text()


def test_a_container_comes_along_without_what_is_its_own(tmp_path: Path) -> None:
    loaded, said = moved(tmp_path, "swap-docker.yaml")
    model = loaded.config.models["devstral"]
    assert (model.gpus, model.port, model.aliases) == ((0, 1), None, ("codes",))
    assert loaded.config.models["embedder"].env == {"VLLM_LOGGING_LEVEL": "DEBUG"}
    assert "HTTPS_PROXY is not copied" in said
    assert "models.other: no image of vLLM's" in said
    assert "made-up" not in said + (tmp_path / "vllm-sleep-tui.yaml").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "stays"),
    [
        ("WANDB", "hf_AbCdEf", False),
        ("PROXY", "https://a:b@host/x", False),
        ("LICENSE", "3f2a9c0b7d1e4f5a8b6c9d0e1f2a3b4c", False),
        ("DB_PASSWD", "swordfish", False),
        ("NCCL_IB_HCA", "mlx5_0:1", True),
        ("HF_HOME", "/data/hub-1234567890123456789012345", True),
        ("NCCL_SOCKET_IFNAME", "${HOME}", True),
    ],
)
def test_what_looks_like_a_secret_is_not_copied(
    tmp_path: Path, variable: str, value: str, stays: bool
) -> None:
    given = f"models: {{a: {{cmd: vllm serve org/x, env: ['{variable}={value}']}}}}"
    done = run_init(tmp_path, "--from", "-", given=given)
    assert done.returncode == 0, done.stderr
    assert (value in (tmp_path / "vllm-sleep-tui.yaml").read_text()) is stays
    assert (f"{variable} is not copied" in done.stdout + done.stderr) is not stays
    assert stays or value not in done.stdout + done.stderr


def test_a_config_that_would_not_load_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    there = tmp_path / "vllm-sleep-tui.yaml"
    there.write_text("models: {mine: {model: org/mine}}\n")
    given = "models: {a: {cmd: vllm serve org/x, env: ['VLLM_SLEEP_TUI_POOL=/x']}}"
    done = run_init(tmp_path, "--force", "--from", "-", given=given)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Nothing was written" in done.stderr
    assert there.read_text() == "models: {mine: {model: org/mine}}\n"
    assert [file.name for file in tmp_path.iterdir()] == [there.name]


def test_a_port_of_a_script_is_kept_and_its_key_is_not(tmp_path: Path) -> None:
    loaded, said = moved(tmp_path, "start.sh")
    assert [model.port for model in loaded.config.models.values()] == [8001, 8002]
    assert "API key is not copied" in said
    assert "made-up" not in said + (tmp_path / "vllm-sleep-tui.yaml").read_text()


def test_a_pasted_line_comes_by_standard_input(tmp_path: Path) -> None:
    done = run_init(
        tmp_path, "--from", "-", given="vllm serve org/model --max-model-len 4096 --frobnicate 3\n"
    )
    assert done.returncode == 0, done.stderr
    assert "--frobnicate is not known to vLLM" in done.stdout + done.stderr
    assert load(tmp_path / "vllm-sleep-tui.yaml").config.models["model"].model == "org/model"


def test_a_program_that_the_file_names_is_not_run_for_its_flags(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ntouch ran\n")
    program.chmod(0o755)
    done = run_init(tmp_path, "--from", "-", given=f"{program} serve org/model\n")
    assert done.returncode == 0, done.stderr
    later = [sys.executable, "-m", "vllm_sleep_tui", "start", "model"]
    refused = subprocess.run(later, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "nobody has agreed" in refused.stderr
    assert not (tmp_path / "ran").exists()


def test_a_running_server_comes_with_its_words_as_they_were_given(tmp_path: Path) -> None:
    override = '{"note": "it\'s $one", "eos_token": "<|end|>"}'
    words = ["/no$where/vllm", "serve", "org/of-a-test", "--api-key", "sekret", "--hf-overrides", override]
    words += ["--kv-transfer-config", '{"kv_connector_extra_config": {"api_key": "sekret-2"}}']
    words += ["--hf-token", "sekret-3", "--max-num-batched-tokens", "12345678"]
    words += ["--revision", "0123456789abcdef0123456789abcdef01234567"]
    # Its name is a process' own choice, and so is what stands behind it.
    sleeper = [sys.executable, "-c", "import time; time.sleep(120)", *words]
    with subprocess.Popen(sleeper) as process:
        try:
            done = run_init(tmp_path, "--from", "running")
        finally:
            process.kill()
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "vllm-sleep-tui.yaml").read_text()
    model = load(tmp_path / "vllm-sleep-tui.yaml").config.models["of-a-test"]
    assert model.args == {
        "hf-overrides": override,
        "max-num-batched-tokens": "12345678",
        "revision": "0123456789abcdef0123456789abcdef01234567",
    }
    assert model.vllm_command == ("/no$where/vllm",)
    assert "--kv-transfer-config is left out, for it holds what looks like a key" in done.stdout + done.stderr
    assert "sekret" not in written + done.stdout + done.stderr


def test_a_port_that_two_want_is_the_first_ones(tmp_path: Path) -> None:
    lines = "vllm serve a --port 8000\nvllm serve b --port 8000\nvllm serve c --port 8800\n"
    done = run_init(tmp_path, "--from", "-", given=lines)
    assert done.returncode == 0, done.stderr
    models = load(tmp_path / "vllm-sleep-tui.yaml").config.models
    assert {name: model.port for name, model in models.items()} == {"a": 8000, "b": None, "c": None}
    assert "line 2: port 8000 has another here" in done.stdout + done.stderr


def test_odd_shapes_are_left_out_and_doubles_are_said(tmp_path: Path) -> None:
    given = """
macros: [1]
models:
  a: {cmd: vllm serve x, aliases: one, env: 7, macros: []}
  b: {cmd: vllm serve y, aliases: [one, two, a, 5], env: [A=1]}
  c: {cmd: program --api-key sekret}
"""
    done = run_init(tmp_path, "--from", "-", given=given)
    assert done.returncode == 0, done.stderr
    models = load(tmp_path / "vllm-sleep-tui.yaml").config.models
    assert {name: model.aliases for name, model in models.items()} == {"a": ("one",), "b": ("two", "5")}
    assert "models.b.aliases: one is already a name of another model" in done.stdout + done.stderr
    assert "sekret" not in done.stdout + done.stderr


@pytest.mark.parametrize("given", ["", "echo hello\n", "models: {a: {cmd: ollama serve}}\n", "a: [", "{}"])
def test_what_starts_no_vllm_is_refused(tmp_path: Path, given: str) -> None:
    done = run_init(tmp_path, "--from", "-", given=given)
    assert done.returncode == 2
    assert "no `vllm serve`" in done.stderr
    assert not (tmp_path / "vllm-sleep-tui.yaml").exists()
