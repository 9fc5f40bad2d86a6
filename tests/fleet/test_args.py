"""What is written under `args:` and `env:`, from outside: the verb, and the command line of its server."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import CommandLine
from tests.fleet.conftest import SIMULATOR

FAST = {"VLLM_SIM_TIMES": "instant"}
HEAD = {"vllm_command": SIMULATOR, "simulated_gpus": [{"name": "Test", "memory": "24GiB"}] * 2}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[CommandLine]:
    line = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    yield line
    if line.config.exists() and "models" in line.config.read_text():
        line.run("stop", "--all", "--force")


def write(shell: CommandLine, models: str, **more: Any) -> None:
    """A config with these models, as a person writes it; the rest stands above."""
    head = "\n".join(f"{name}: {json.dumps(value)}" for name, value in (HEAD | more).items())
    shell.config.write_text(
        f"{head}\nmodels:\n{textwrap.indent(textwrap.dedent(models), '  ')}", encoding="utf-8"
    )


def one(args: str, more: str = "", gpus: str = "[0]") -> str:
    return (
        f"a:\n  model: sim/1GiB\n  gpus: {gpus}\n  env: {{VLLM_SIM_TIMES: instant}}\n"
        + textwrap.indent(textwrap.dedent(more), "  ")
        + (f"  args:\n{textwrap.indent(textwrap.dedent(args), '    ')}" if args else "")
    )


def started(shell: CommandLine, models: str, name: str = "a") -> psutil.Process:
    write(shell, models)
    done = shell.run("start", name)
    assert done.returncode == 0, done.stderr
    return psutil.Process(shell.status()[name]["pid"])


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def refusal(shell: CommandLine, models: str, *verb: str) -> str:
    write(shell, models)
    done = shell.run(*(verb or ("status",)))
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 2, done.stderr
    return done.stderr


def test_what_is_written_reaches_the_server_as_written(shell: CommandLine) -> None:
    args = """
        revision: 12e4567
        code-revision: 0012345
        tokenizer-revision: 1.10
        seed: -3
        download-dir: yes
        compilation-config.pass_config.fuse_allreduce_rms: false
        tp: 1
        enforce-eager: true
        enable_prefix_caching: false
        disable-log-stats: false
        trust-remote-code: yes
        hf-overrides: {rope_scaling: {factor: 4.0, beta: 1e5, name: "5"}}
        lora-modules: [a=x, {name: b, path: y}]
        max-model-len:
        """
    words = started(shell, one(args)).cmdline()
    assert after(words, "--revision") == "12e4567"
    assert after(words, "--code-revision") == "0012345"
    assert after(words, "--tokenizer-revision") == "1.10"
    assert after(words, "--download-dir") == "yes"
    assert after(words, "--compilation-config.pass_config.fuse_allreduce_rms") == "false"
    assert after(words, "--tensor-parallel-size") == "1"
    assert after(words, "--hf-overrides") == '{"rope_scaling": {"factor": 4.0, "beta": 1e5, "name": "5"}}'
    assert words[words.index("--lora-modules") :][1:3] == ["a=x", '{"name": "b", "path": "y"}']
    assert {"--seed=-3", "--enforce-eager", "--no-enable-prefix-caching", "--trust-remote-code"} <= set(words)
    assert not [word for word in words if "log-stats" in word or "max-model-len" in word]


def test_a_list_of_words_is_taken_as_a_command_line_is(shell: CommandLine) -> None:
    more = 'args: [--max_model_len=4096, -tp, "1", --enforce-eager, --cudagraph-capture-sizes, 1, 2]\n'
    words = started(shell, one("", more)).cmdline()
    assert after(words, "--max-model-len") == "4096"
    assert after(words, "--tensor-parallel-size") == "1"
    assert words[words.index("--cudagraph-capture-sizes") :][1:3] == ["1", "2"]
    assert "--enforce-eager" in words


@pytest.mark.parametrize(
    ("args", "key", "says"),
    [
        ("hos: 0.0.0.0", "hos", "means host, reserved"),
        ("grpc: true", "grpc", "reserved"),
        ("asc: 2", "asc", "means api-server-count, reserved"),
        ("disable-sleep-mode: true", "disable-sleep-mode", "means enable-sleep-mode, reserved"),
        ("ssl-cert: x", "ssl-cert", "the beginning of several flags: ssl-cert-reqs, ssl-certfile"),
        ("ssl-ciphers: x", "ssl-ciphers", "reserved"),
        ("device-ids: 0", "device-ids", "reserved"),
        ("data-parallel-hybrid: true", "data-parallel-hybrid", "means data-parallel-hybrid-lb, reserved"),
        ("gpu-memory-util: 1.2", "gpu-memory-utilization", "must be a number above 0"),
        ("enforce-eager: 2", "enforce-eager", "takes no value"),
        ("max-model-len: 1\nmax_model: 2", "max_model", "the same as max-model-len"),
    ],
)
def test_no_spelling_gets_past_the_reserved_flags(shell: CommandLine, args: str, key: str, says: str) -> None:
    err = refusal(shell, one(args))
    assert f"models.a.args.{key}: " in err
    assert says in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("[--host, 0.0.0.0]", "models.a.args[0]: reserved"),
        ("[--enforce-eager, --api-k=x]", "models.a.args[1]: means api-key, reserved"),
        ("[-n, '2', -asc, '4']", "models.a.args[2]: means api-server-count, reserved"),
        ("[8192]", "models.a.args[0]: '8192' belongs to no flag"),
    ],
)
def test_a_list_of_words_is_held_to_the_same(shell: CommandLine, words: str, says: str) -> None:
    assert says in refusal(shell, one("", f"args: {words}\n"))


def test_a_file_of_flags_is_read_and_held_to_the_same(shell: CommandLine) -> None:
    flags = shell.config.with_name("serve.yaml")
    flags.write_text("max-model-len: 4096\ntensor_parallel_size: 2\nheadless: true\n")
    err = refusal(shell, one("config: serve.yaml", gpus="[0, 1]"))
    assert f"{flags}:3: headless: reserved" in err
    flags.write_text("max-model-len: 4096\ntensor_parallel_size: 2\nrevision: 1.10\n")
    assert "2" in refusal(shell, one("config: serve.yaml"))  # the GPUs that it needs are counted
    words = started(shell, one("config: serve.yaml\nmax-model-len: 2048", gpus="[0, 1]")).cmdline()
    assert (after(words, "--max-model-len"), after(words, "--tensor-parallel-size")) == ("2048", "2")
    assert after(words, "--revision") == "1.10"
    assert "--config" not in words


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            "max-modle-len: 8",
            "vLLM 0.32.0 knows no --max-modle-len. The nearest that it knows is max-model-len.",
        ),
        ("swap-space: 4", "vLLM 0.32.0 knows no --swap-space"),
        ("max-num-partial-prefills: 4", "knows no --max-num-partial-prefills (vLLM 0.24.0, 0.26.0 does)"),
        ("max-num-seqs: many", "--max-num-seqs: 'many' is not a whole number"),
        ("dtype: bfloat", "--dtype: 'bfloat' is none of: "),
        ("revision: [x]", "--revision: takes one value, not a list"),
    ],
)
def test_what_the_parser_would_refuse_is_named_before_a_start(
    shell: CommandLine, args: str, says: str
) -> None:
    err = refusal(shell, one(args), "start", "a")
    assert says in " ".join(err.split("\n")).replace("  ", " ")
    assert f"{shell.config}:9: models.a.args." in err
    write(shell, one(args))
    assert shell.status()["a"]["state"] == "stopped"
    doctor = json.loads(shell.run("doctor", "--json").stdout)["checks"]
    assert [check for check in doctor if check["name"].startswith("a.args.") and check["verdict"] == "fail"]


def test_two_replicas_need_two_gpus_and_each_is_proven(shell: CommandLine) -> None:
    err = refusal(shell, one("data-parallel-size: 2"))
    assert "1 GPU named, but tensor times pipeline times data parallel size is 2" in err
    started(shell, one("dp: 2", gpus="[0, 1]"))
    shell("sleep", "a")
    shell("wake", "a")
    assert shell.look("a").proof == "proven"


def test_one_rule_fills_in_variables_everywhere(shell: CommandLine) -> None:
    shell.environment |= {"WHERE": "/data", "SIZE": "2048", "TIMES": "instant"}
    shell.config.with_name("a.env").write_text(
        "# how it is run\nexport FROM_FILE=$WHERE/x\nLITERAL='$WHERE'\nQUOTED=\"a b\"\nMINE=file\n"
    )
    models = """
        a:
          model: sim/${GIB:-1}GiB
          args: {download-dir: ~/models, max-model-len: $SIZE, revision: "a$$b", tokenizer: "${NONE:-x}/y"}
          env_file: [a.env]
          env: [VLLM_SIM_TIMES=$TIMES, "HOUSE=~/h", MINE=list, WHERE]
        """
    server = started(shell, models)
    words, environ = server.cmdline(), server.environ()
    home = os.path.expanduser("~")
    assert "sim/1GiB" in words
    assert after(words, "--download-dir") == f"{home}/models"
    assert after(words, "--max-model-len") == "2048"
    assert after(words, "--revision") == "a$b"
    assert after(words, "--tokenizer") == "x/y"
    wanted = {"FROM_FILE": "/data/x", "LITERAL": "$WHERE", "QUOTED": "a b", "MINE": "list", "WHERE": "/data"}
    assert {name: environ.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "name", ["TMPDIR", "CUDA_DEVICE_ORDER", "VLLM_HOST_IP", "VLLM_SERVER_DEV_MODE", "SLEEP_TUI_LAUNCH"]
)
def test_a_variable_of_ours_is_refused_with_the_reason(shell: CommandLine, name: str) -> None:
    assert f"models.a.env.{name}: reserved" in refusal(shell, f"a: {{model: x/y, env: {{{name}: 'x'}}}}\n")
    shell.config.with_name("a.env").write_text(f"A=1\n{name}=x\n")
    assert f"a.env:2: {name}: reserved" in refusal(shell, "a: {model: x/y, env_file: a.env}\n")


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        ("GPU-1b2c3d4e-0000-1111-2222-333344445555", "gpus[0]: a GPU's UUID"),
        ("MIG-1b2c3d4e-0000-1111-2222-333344445555", "use `url:`"),
    ],
)
def test_a_gpu_that_is_named_otherwise_is_told_what_to_write(shell: CommandLine, gpu: str, says: str) -> None:
    assert says in refusal(shell, one("", gpus=f"[{gpu}]"))


def test_a_name_is_what_clients_say_and_its_files_are_safe(shell: CommandLine) -> None:
    name = "Qwen/Qwen3 8B:latest/../" + "x" * 90
    model = (
        f"{json.dumps(name)}:\n  model: sim/1GiB\n  aliases: [gpt-4o]\n  env: {{VLLM_SIM_TIMES: instant}}\n"
    )
    words = started(shell, model, name).cmdline()
    assert words[words.index("--served-model-name") :][1:3] == [name, "gpt-4o"]
    assert shell("chat", name, "hello").strip()
    state = shell.state_home / "vllm-sleep-tui"
    inside = {path.parent.name for path in state.rglob("*") if path.is_file()}
    assert inside <= {"logs", "records", "gpus", "vllm-sleep-tui", "flags"} | {
        path.name for path in state.rglob("*")
    }
    assert len(list((state / "logs").iterdir())) == 1
    assert not list(shell.config.parent.glob("x*"))
    assert shell("logs", name, "-n", "1").strip()


def test_a_key_of_our_own_server_is_in_no_command_line_and_is_sent(shell: CommandLine) -> None:
    key = shell.config.with_name("a.key")
    key.write_text("sk-of-this-test\n")
    key.chmod(0o600)
    server = started(shell, one("", "api_key_file: a.key\n"))
    assert "sk-of-this-test" not in " ".join(server.cmdline())
    assert server.environ()["VLLM_API_KEY"] == "sk-of-this-test"
    assert shell("chat", "a", "hello").strip()
    shell("sleep", "a")
    shell("wake", "a")
    assert shell.look("a").proof == "proven"
    assert not [
        path for path in shell.state_home.rglob("*") if path.is_file() and b"sk-of-this" in path.read_bytes()
    ]


@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("one", ""), ("", "two")])
def test_a_key_that_changed_while_its_server_runs_is_told_and_harms_nobody(
    shell: CommandLine, before: str, after: str
) -> None:
    def config(key: str) -> str:
        if key:
            path = shell.config.with_name("a.key")
            path.write_text(f"{key}\n")
            path.chmod(0o600)
        return one("", "api_key_file: a.key\n" if key else "")

    started(shell, config(before))
    assert shell.status()["a"]["reason"] is None
    write(shell, config(after))
    told = shell.status()["a"]
    assert "the key that it was started with" in told["reason"]
    assert "restart a" in told["cure"]
    shell("sleep", "a")
    shell("wake", "a")
    assert shell.look("a").proof == "proven"
    assert shell("chat", "a", "hello").strip()
    shell("restart", "a")
    assert shell.status()["a"]["reason"] is None
    assert shell("chat", "a", "hello").strip()


def test_a_model_may_have_a_vllm_of_its_own(shell: CommandLine) -> None:
    models = (
        f"a: {{model: sim/1GiB, vllm_command: {json.dumps(SIMULATOR)}, env: {{VLLM_SIM_TIMES: instant}}}}\n"
    )
    write(shell, models + "b: {model: sim/1GiB}\n", vllm_command=["/nowhere/vllm"])
    assert shell.run("start", "a").returncode == 0
    done = shell.run("start", "b")
    assert (done.returncode, "vllm_command: '/nowhere/vllm' was not found" in done.stderr) == (2, True)


def fake_vllm(folder: Path, flags: list[dict[str, Any]]) -> Path:
    """An environment whose Python answers as vLLM's parser would, and counts how often it is asked."""
    folder.mkdir()
    python = folder / "python3"
    answer = json.dumps({"version": "9.9.9", "flags": flags})
    python.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print(sys.argv[1], file=open({str(folder / 'asked')!r}, 'a'))\nprint({answer!r})\n"
    )
    vllm = folder / "vllm"
    vllm.write_text(f"#!{python}\n")
    for file in (python, vllm):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return vllm


def test_the_installed_vllm_is_asked_once_and_its_word_holds(tmp_path: Path) -> None:
    shell = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    vllm = fake_vllm(tmp_path / "env", [{"names": ["--only-here"], "type": "int"}])
    shell.config.write_text(
        json.dumps(
            {"vllm_command": [str(vllm)], "models": {"a": {"model": "x/y", "gpus": [], "args": {"seed": 1}}}}
        )
    )
    asked = tmp_path / "env/asked"
    shell("status")
    assert not asked.exists()  # who only looks does not pay for it
    for _ in range(2):
        done = shell.run("start", "a")
        assert done.returncode == 2
        assert "models.a.args.seed: vLLM 9.9.9 knows no --seed" in done.stderr
    doctor = json.loads(shell.run("doctor", "--json").stdout)["checks"]
    assert {"flags": "ok", "a.args.seed": "fail"}.items() <= {c["name"]: c["verdict"] for c in doctor}.items()
    assert len(asked.read_text().splitlines()) == 1
    vllm.write_text(vllm.read_text() + "# installed anew\n")
    assert shell.run("start", "a").returncode == 2
    assert len(asked.read_text().splitlines()) == 2


HELP = Path(__file__).parents[1] / "unit/data/serve-help-0.32.txt"
"""Of real vLLM, shortened."""


def a_wrapper(folder: Path, version: str) -> Path:
    """A script around vLLM that stands in its config's folder and notes what it is asked."""
    script = folder / "wrap.sh"
    script.write_text(
        f"""#!/bin/bash
echo "$@" >> asked
case "$*" in
  "serve --help=all") cat {HELP} ;;
  --version) echo {version} ;;
esac
"""
    )
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("version", ["0.32.0", ""])
def test_a_wrapper_is_asked_for_its_help_once(tmp_path: Path, version: str) -> None:
    shell = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    a_wrapper(tmp_path, version)
    wrong = {"max-modle-len": 8, "gdn-prefill-backend": "nope", "max-model-len": "much", "made-up": 1}
    right = {"enforce-eager": False, "tool-call-parser": "mine", "tp": 1}
    model = {"model": "x/y", "gpus": [], "args": wrong | right}
    shell.config.write_text(json.dumps({"vllm_command": ["./wrap.sh"], "models": {"a": model}}))
    asked = tmp_path / "asked"
    shell("status")
    assert not asked.exists()  # who only looks does not pay for it
    for _ in range(2):
        done = shell.run("start", "a")
        assert done.returncode == 2
        assert f"vLLM {version or 'of a version that it does not tell'} knows no --m" in done.stderr
    checks = {c["name"]: c for c in json.loads(shell.run("doctor", "--json").stdout)["checks"]}
    assert checks["flags"]["verdict"] == "ok"
    failed = {name for name, check in checks.items() if check["verdict"] == "fail"}
    assert {f"a.args.{name}" for name in wrong} == {name for name in failed if ".args." in name}
    assert "max-model-len" in checks["a.args.max-modle-len"]["cure"]
    assert sorted(asked.read_text().splitlines()) == ["--version", "serve --help=all"]


def test_a_wrapper_whose_word_is_old_is_asked_again(tmp_path: Path) -> None:
    shell = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    a_wrapper(tmp_path, "0.32.0")
    model = {"model": "x/y", "gpus": [], "args": {"made-up": 1}}
    shell.config.write_text(json.dumps({"vllm_command": ["./wrap.sh"], "models": {"a": model}}))
    assert shell.run("start", "a").returncode == 2
    (kept,) = tmp_path.rglob("state/**/flags/*.json")
    two_days_ago = kept.stat().st_mtime - 2 * 86_400
    os.utime(kept, (two_days_ago, two_days_ago))
    assert shell.run("start", "a").returncode == 2
    assert (tmp_path / "asked").read_text().count("--help=all") == 2


def test_a_wrapper_that_shows_no_help_stands_aside_and_that_is_said(tmp_path: Path) -> None:
    shell = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    vllm = tmp_path / "vllm"
    vllm.write_text("#!/bin/sh\nexec true\n")
    vllm.chmod(0o755)
    model = {"model": "x/y", "gpus": [], "args": {"max-modle-len": 1}}
    shell.config.write_text(json.dumps({"vllm_command": [str(vllm)], "models": {"a": model}}))
    checks = {c["name"]: c for c in json.loads(shell.run("doctor", "--json").stdout)["checks"]}
    assert checks["flags"]["verdict"] == "warn"
    assert "could not be asked" in checks["flags"]["what"]
    assert checks["a.args.max-modle-len"]["verdict"] == "warn"


def test_the_simulator_refuses_what_vllm_refuses() -> None:
    words = [*SIMULATOR, "serve", "m", "--no-disable-log-stats"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: unrecognized arguments: --no-disable-log-stats" in done.stderr
