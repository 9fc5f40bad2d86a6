"""The config file: what is read from it, and the one line that each mistake gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.config.load import LoadedConfig, load, parse_bytes, parse_duration
from vllm_sleep_tui.config.parameters import Parameters
from vllm_sleep_tui.config.types import (
    Config,
    GatewayConfig,
    GatewayKeyConfig,
    IdleConfig,
    ModelConfig,
    SimulatedGpuConfig,
)
from vllm_sleep_tui.errors import UsageError

FULL = """\
vllm_command: [/opt/vllm/bin/vllm]
models:
  qwen:
    model: Qwen/Qwen3-0.6B
    gpus: [0, 1]
    level: 2
    args: {max-model-len: 8192, tensor_parallel_size: 2}
    env: {HF_HOME: /data/hf}
    port: 8001
    autostart: true
    idle: {sleep_after: 10m, stop_after: 2h}
  attached:
    url: http://127.0.0.1:8000
gateway: {port: 8800}
simulated_gpus: [{name: Demo, memory: 24GiB}, {name: Demo, memory: 24GiB}]
"""


def load_text(folder: Path, text: str) -> LoadedConfig:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path)


def test_every_key_of_a_full_file_is_read(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, FULL)
    qwen = loaded.config.models["qwen"]
    assert loaded.path == tmp_path / "c.yaml"
    assert loaded.lines["models.qwen.gpus[1]"] == 5
    assert (qwen.model, qwen.gpus, qwen.level, qwen.port, qwen.autostart) == (
        "Qwen/Qwen3-0.6B",
        (0, 1),
        2,
        8001,
        True,
    )
    assert qwen.idle == IdleConfig(sleep_after="10m", stop_after="2h")
    assert qwen.args == {"max-model-len": "8192", "tensor-parallel-size": "2"}
    assert loaded.config.models["attached"].url == "http://127.0.0.1:8000"
    assert loaded.config.gateway is not None
    assert loaded.config.vllm_command == ("/opt/vllm/bin/vllm",)


def test_a_model_needs_no_more_than_its_model(tmp_path: Path) -> None:
    model = load_text(tmp_path, "models: {a: {model: x/y}}").config.models["a"]
    assert (model.gpus, model.level, model.port, model.args, model.env) == ((0,), "auto", None, {}, {})


def test_values_merged_from_an_anchor_count(tmp_path: Path) -> None:
    text = "models:\n  a: &a {model: x/y, gpus: [1]}\n  b: {<<: *a, model: x/z}\n"
    models = load_text(tmp_path, text).config.models
    assert (models["b"].model, models["b"].gpus) == ("x/z", (1,))


ONE = "models:\n  qwen:\n    model: Qwen/Qwen3-0.6B\n"

MISTAKES = {
    "kv cache without a unit": (
        ONE + "    kv_cache: 20\n",
        4,
        "models.qwen.kv_cache: must be an amount of memory, such as 20GiB",
    ),
    "kv cache of nothing": (ONE + "    kv_cache: 0GiB\n", 4, "kv_cache: an amount of memory must be more"),
    "unknown top key": ("modles: {}\n", 1, "modles: unknown key; the nearest known one is models"),
    "unknown model key": (
        ONE + "    gpu: [0]\n",
        4,
        "models.qwen.gpu: unknown key; the nearest known one is gpus",
    ),
    "unknown idle key": (ONE + "    idle:\n      sleep: 10m\n", 5, "models.qwen.idle.sleep: unknown key"),
    "a preset out of its range": (
        ONE + "presets:\n  wild:\n    top_p: 2\n",
        6,
        "presets.wild.top_p: must be a number above 0 and up to 1, not 2",
    ),
    "a schema that is no file": (
        ONE + "presets:\n  json:\n    schema: nowhere.json\n",
        6,
        "presets.json.schema: cannot be read: ",
    ),
    "a schema in the home of nobody": (
        ONE + "presets:\n  json:\n    schema: ~nobody-of-that-name/x.json\n",
        6,
        "presets.json.schema: is no name of a file: ~nobody-of-that-name/x.json",
    ),
    "unknown gateway key": (
        ONE + "gateway:\n  prot: 1\n",
        5,
        "gateway.prot: unknown key; the nearest known one is port",
    ),
    "unknown simulated key": (
        ONE + "simulated_gpus:\n  - size: 1\n",
        5,
        "simulated_gpus[0].size: unknown key",
    ),
    "gpus is text": (ONE + "    gpus: zero\n", 4, "models.qwen.gpus: must be a list of GPU numbers"),
    "gpus is one number": (ONE + "    gpus: 0\n", 4, "models.qwen.gpus: must be a list of GPU numbers"),
    "negative GPU": (
        ONE + "    gpus: [0, -1]\n",
        4,
        "models.qwen.gpus: must be a list of GPU numbers from 0",
    ),
    "level 3": (ONE + "    level: 3\n", 4, "models.qwen.level: must be auto, 0, 1, 2 or none, not 3"),
    "port is text": (ONE + "    port: http\n", 4, "models.qwen.port: must be a whole number from 1 to 65535"),
    "port too high": (
        ONE + "    port: 65536\n",
        4,
        "models.qwen.port: must be a whole number from 1 to 65535",
    ),
    "port zero": (ONE + "    port: 0\n", 4, "models.qwen.port: must be a whole number"),
    "autostart is text": (ONE + "    autostart: yes\n", 4, "models.qwen.autostart: must be true or false"),
    "args is text": (ONE + "    args: --x\n", 4, "models.qwen.args: must be a mapping of flags"),
    "env value is a list": (ONE + "    env:\n      A: [1]\n", 5, "models.qwen.env.A: must be text"),
    "idle is text": (ONE + "    idle: 10m\n", 4, "models.qwen.idle: must be a mapping"),
    "bad duration": (
        ONE + "    idle:\n      sleep_after: 10\n",
        5,
        "models.qwen.idle.sleep_after: must be a time",
    ),
    "bad unit": (ONE + "    idle:\n      stop_after: 2y\n", 5, "models.qwen.idle.stop_after: must be a time"),
    "zero duration": (
        ONE + "    idle:\n      stop_after: 0s\n",
        5,
        "models.qwen.idle.stop_after: a duration must",
    ),
    "bad memory": (
        ONE + "simulated_gpus: [{name: a, memory: 24}]\n",
        4,
        "simulated_gpus[0].memory: must be an amount",
    ),
    "simulated without memory": (
        ONE + "simulated_gpus:\n  - name: a\n",
        5,
        "simulated_gpus[0]: memory is missing",
    ),
    "command is text": ("vllm_command: vllm\n" + ONE, 1, "vllm_command: must be a list of words"),
    "command in one word": ("vllm_command: [vllm serve]\n" + ONE, 1, "vllm_command: one word too many"),
    "command with serve": ("vllm_command: [vllm, serve]\n" + ONE, 1, "vllm_command: one word too many"),
    "command is empty": ("vllm_command: []\n" + ONE, 1, "vllm_command: must be a list of words"),
    "models is a list": ("models: [a]\n", 1, "models: must be a mapping of names to models"),
    "no models": ("models: {}\n", 1, "models: no model is named"),
    "models missing": ("vllm_command: [vllm]\n", 1, "models: no model is named"),
    "model is nothing": ("models:\n  qwen:\n", 2, "models.qwen: must be a mapping"),
    "model without source": (
        "models:\n  qwen: {gpus: [0]}\n",
        2,
        "models.qwen: has neither `model` nor `url`",
    ),
    "model with both": (ONE + "    url: http://127.0.0.1:1\n", 2, "models.qwen: has both `model` and `url`"),
    "model looks like a flag": ("models: {a: {model: --help}}\n", 1, "models.a.model: not a model"),
    "url without scheme": ("models: {a: {url: localhost:8000}}\n", 1, "models.a.url: not a server's address"),
    "url with password": (
        "models: {a: {url: 'http://u:p@h:1'}}\n",
        1,
        "models.a.url: not a server's address",
    ),
    "url port too high": (
        "models: {a: {url: 'http://h:99999'}}\n",
        1,
        "models.a.url: not a server's address",
    ),
    "url with args": ("models: {a: {url: 'http://h:1', args: {x: 1}}}\n", 1, "models.a.args: has no effect"),
    "name begins with a space": ("models: {' a': {model: x}}\n", 1, "models. a: not a name for a model"),
    "name shows nothing": ('models: {"\\u200b": {model: x}}\n', 1, "not a name for a model"),
    "name is a flag": ("models: {-a: {model: x}}\n", 1, "models.-a: not a name for a model"),
    "name too long": (f"models: {{{'a' * 256}: {{model: x}}}}\n", 1, "not a name for a model"),
    "name is a number": ("models: {8: {model: x}}\n", 1, "models.8: a key must be text"),
    "two ports": (
        "models:\n  a: {model: x, port: 8001}\n  b: {model: y, port: 8001}\n",
        3,
        "models.b.port: port 8001 is already that of models.a",
    ),
    "gateway's port": (
        "models:\n  a: {model: x, port: 8800}\ngateway:\n  port: 8800\n",
        4,
        "gateway.port: port 8800 is already that of models.a",
    ),
    "url's port": (
        "models:\n  a: {url: 'http://127.0.0.1:8001'}\n  b: {model: y, port: 8001}\n",
        3,
        "models.b.port: port 8001 is already that of models.a",
    ),
    "models of a client are a number": (
        ONE + "gateway: {keys: [{name: n, models: 7}]}\n",
        4,
        "gateway.keys[0].models: must be a list of names of models, such as [qwen], not 7",
    ),
    "too few GPUs": (
        ONE + "    args: {tensor-parallel-size: 2, --pipeline_parallel_size: 2}\n    gpus: [0, 1]\n",
        5,
        "models.qwen.gpus: 2 GPU named, but tensor times pipeline times data parallel size is 4",
    ),
    "too few GPUs, short flag": (ONE + "    args: {tp: 2}\n", 2, "models.qwen.gpus: 1 GPU named"),
    "parallel size is text": (ONE + "    args: {tp: two}\n", 4, "must be a whole number from 1"),
    "GPU twice": (ONE + "    gpus: [1, 1]\n", 4, "models.qwen.gpus: GPU 1 is there twice"),
    "no such simulated GPU": (
        ONE + "    gpus: [1]\nsimulated_gpus: [{name: a, memory: 1GiB}]\n",
        4,
        "models.qwen.gpus: there is no simulated GPU 1",
    ),
    "one flag in two spellings": (
        ONE + "    args:\n      max-model-len: 1\n      --max_model_len: 2\n",
        6,
        "models.qwen.args.--max_model_len: the same as max-model-len",
    ),
    "flag with its value": (
        ONE + "    args:\n      seed=1: true\n",
        5,
        "models.qwen.args.seed=1: not a flag's name",
    ),
    "vLLM's inner port": (ONE + "    env: {VLLM_PORT: '8000'}\n", 4, "VLLM_PORT: reserved"),
    "own environment": (ONE + "    env: {CUDA_VISIBLE_DEVICES: '0'}\n", 4, "CUDA_VISIBLE_DEVICES: reserved"),
    "duplicate key": ("models:\n  a: {model: x}\n  a: {model: y}\n", 3, "a: this key is there twice"),
    "tab": ("models:\n\ta: {model: x}\n", 2, "a tab is used for indentation"),
    "broken YAML": ("models: {a: [1\n", 2, "not YAML"),
    "two documents": (ONE + "---\n" + ONE, 4, "not YAML"),
    "empty": ("", 1, "the file is empty"),
    "only a comment": ("# nothing\n", 1, "the file is empty"),
    "a list": ("- a\n", 1, "must be a mapping"),
    "a word": ("hello\n", 1, "must be a mapping, lines of `key: value`, not text"),
    "a tag": ("models: {a: {model: !!python/name:os.system ''}}\n", 1, "models.a.model: a tag"),
    "a control character": ("models:\n  a: {model: x\x01}\n", 2, "a control character"),
    "an alias of itself": ("models: &a {x: *a}\n", 1, "models.x: must be a mapping"),
    "deep nesting": (f"models: {'[' * 40}{']' * 40}\n", 1, "models[0]: nested too deeply"),
    "very deep nesting": ("[" * 1500, 1, "not YAML"),
}


@pytest.mark.parametrize(("text", "line", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_names_file_line_key_and_cure(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, text)
    assert f"c.yaml:{line}: " in caught.value.what
    assert words in caught.value.what
    assert caught.value.cure
    assert "\n" not in caught.value.what + caught.value.cure


FILES: dict[type[msgspec.Struct], str] = {
    Config: "models: {a: {model: x}}\n@: [[[]]]\n",
    ModelConfig: "models: {a: {@: [[[]]]}}\n",
    IdleConfig: "models: {a: {model: x, idle: {@: [[[]]]}}}\n",
    GatewayConfig: "models: {a: {model: x}}\ngateway: {@: [[[]]]}\n",
    GatewayKeyConfig: "models: {a: {model: x}}\ngateway: {keys: [{@: [[[]]]}]}\n",
    SimulatedGpuConfig: "models: {a: {model: x}}\nsimulated_gpus: [{@: [[[]]]}]\n",
    Parameters: "models: {a: {model: x}}\npresets: {exact: {@: [[[]]]}}\n",
}
"""For each kind of mapping a file with one, in which `@` is a key, with a value that no key takes."""
KEYS = [(kind, key) for kind in FILES for key in kind.__struct_fields__ if (kind, key) != (Config, "models")]


@pytest.mark.parametrize(("kind", "key"), KEYS, ids=[f"{kind.__name__}.{key}" for kind, key in KEYS])
def test_a_value_of_the_wrong_kind_is_told_what_its_key_takes(
    tmp_path: Path, kind: type[msgspec.Struct], key: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, FILES[kind].replace("@", key))
    assert key in caught.value.what
    assert "something else" not in caught.value.what


@pytest.mark.parametrize(
    "name",
    [
        "host",
        "port",
        "uds",
        "served-model-name",
        "api-key",
        "middleware",
        "api-server-count",
        "enable-sleep-mode",
    ],
)
@pytest.mark.parametrize("spell", ["{}", "--{}", "no-{}", "--no-{}"])
@pytest.mark.parametrize("change", [str, str.upper, lambda name: name.replace("-", "_")])
def test_an_argument_of_ours_is_refused_in_every_spelling(
    tmp_path: Path, name: str, spell: str, change: Callable[[str], str]
) -> None:
    spelled = spell.format(change(name))
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, f'{ONE}    args:\n      "{spelled}": 1\n')
    assert f"c.yaml:5: models.qwen.args.{spelled}: reserved" in caught.value.what
    assert caught.value.cure


@pytest.mark.parametrize(
    "command",
    [
        "[conda, run, -n, vllm, vllm]",
        "[uv, run, vllm]",
        "[docker, run, vllm]",
        "[/usr/bin/podman, run]",
        "[sudo, vllm]",
    ],
)
def test_a_command_that_hides_the_server_points_to_url(tmp_path: Path, command: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, f"vllm_command: {command}\n{ONE}")
    assert "c.yaml:1: vllm_command:" in caught.value.what
    assert "`url:`" in caught.value.cure


def test_variables_are_filled_in_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHE", "/data")
    text = ONE + '    env: {H: "${CACHE}/hf"}\n    args: {download-dir: "${CACHE}", names: ["${CACHE}", b]}\n'
    qwen = load_text(tmp_path, text).config.models["qwen"]
    assert qwen.env == {"H": "/data/hf"}
    assert qwen.args == {"download-dir": "/data", "names": ("/data", "b")}


def test_an_unset_variable_is_named_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"c.yaml:5: models.qwen.env.TOKEN: .*NOT_SET_ANYWHERE is not set"):
        load_text(tmp_path, ONE + '    env:\n      TOKEN: "${NOT_SET_ANYWHERE}"\n')


def test_a_secret_of_the_environment_shows_in_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "hf_very_secret")
    text = ONE + '    env: {HF_TOKEN: "${TOKEN}"}\n    args: {x: "${TOKEN}"}\n'
    loaded = load_text(tmp_path, text)
    assert "very_secret" not in f"{loaded!r} {loaded.config.models['qwen']}"
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, ONE + '    args: {tp: "${TOKEN}"}\n')
    assert "very_secret" not in caught.value.what + caught.value.cure


def test_a_token_in_the_arguments_is_sent_to_the_environment(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_text(tmp_path, ONE + "    args: {hf_token: hf_very_secret}\n")
    assert "HF_TOKEN" in caught.value.cure
    assert "very_secret" not in caught.value.what + caught.value.cure


def test_relative_paths_are_taken_from_the_files_folder(tmp_path: Path) -> None:
    loaded = load_text(
        tmp_path, "vllm_command: [./venv/bin/vllm]\nmodels: {a: {model: ./m}, b: {model: org/m}}\n"
    )
    assert loaded.config.vllm_command == (str(tmp_path / "venv/bin/vllm"),)
    assert loaded.config.models["a"].model == str(tmp_path / "m")
    assert loaded.config.models["b"].model == "org/m"


def test_relative_paths_of_a_file_behind_a_link_are_taken_from_the_files_own_folder(tmp_path: Path) -> None:
    for name in ("own", "here"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.env").write_text(f"WHOSE={name}\n")
        (tmp_path / name / "key").write_text(f"{name}\n")
        (tmp_path / name / "serve.yaml").write_text(f"revision: {name}\n")
    own, link = tmp_path / "own/c.yaml", tmp_path / "here/c.yaml"
    own.write_text(
        "vllm_command: [./bin/vllm]\n"
        "models: {a: {model: ./m, env_file: a.env, api_key_file: key, args: {config: serve.yaml}}}\n"
    )
    link.symlink_to(own)
    config = load(link).config
    a = config.models["a"]
    assert (config.vllm_command, a.model) == ((str(own.parent / "bin/vllm"),), str(own.parent / "m"))
    assert (a.env, a.api_key, a.args) == ({"WHOSE": "own"}, "own", {"revision": "own"})


@pytest.mark.parametrize("files", ["a.env", "[a.env]"])
def test_a_server_of_somebody_else_takes_no_file_of_variables(tmp_path: Path, files: str) -> None:
    (tmp_path / "a.env").write_text("A=1\n")
    with pytest.raises(UsageError, match=r"c.yaml:1: models\.a\.env_file: has no effect"):
        load_text(tmp_path, f"models: {{a: {{url: 'http://h:1', env_file: {files}}}}}\n")


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, "models: {qwen: {model: x}, coder: {model: y}}\n")
    with pytest.raises(UsageError) as caught:
        loaded.model("codr")
    assert "'codr'" in caught.value.what
    assert "Did you mean coder?" in caught.value.cure
    with pytest.raises(UsageError) as caught:
        loaded.model("zzz")
    assert caught.value.cure == "There are: qwen, coder."


def test_a_file_that_is_no_text_or_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"models:\n  \xff: 1\n")
    with pytest.raises(UsageError, match=r"c.yaml:2: not UTF-8"):
        load(path)
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="larger than 1 MB"):
        load(path)
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)


@given(st.text(max_size=200))
def test_no_text_whatever_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(UsageError):
        load(path)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5d", 129600)]
)
def test_a_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "-1s", "1 h", "0s", "1w", "1s ", "1s\n"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("512 MiB", 2**29), ("1.5TiB", 3 * 2**39), ("7B", 7)],
)
def test_an_amount_of_memory_is_read_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "GiB", "-1GiB", "24iB", "0GiB", "24gib", "1GiB\n"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        parse_bytes(text)
