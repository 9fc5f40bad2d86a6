"""`advise` on folders that a stranger filled: each ends in an answer that names the file, not in a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.made_checkpoints import QWEN, write_model, write_safetensors

COMMAND = [sys.executable, "-m", "vllm_sleep_tui"]
CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
DEEP = "[" * 400_000 + "]" * 400_000
"""Deeper than any Python's stack: up to 3.13 1,000 are too deep, from 3.14 on it is what 8 MiB hold."""
TENSOR = '"dtype":"BF16","shape":[8],"data_offsets":[0,16]'
Spoil = Callable[[Path], None]


def config(content: str | bytes) -> Spoil:
    """A config.json of this content."""
    written = content if isinstance(content, bytes) else content.encode()
    return lambda folder: replace(folder / CONFIG, written)


def setting(text: str) -> Spoil:
    """A whole config.json that ends with this setting, which wins over an earlier one of its name."""
    return config(f"{json.dumps(QWEN)[:-1]}, {text}}}")


def index(content: str) -> Spoil:
    """An index of this content beside the weights."""
    return lambda folder: replace(folder / INDEX, content.encode())


def header(content: str | bytes, room: int = 16) -> Spoil:
    """A safetensors file with this header and room for tensors."""
    written = content if isinstance(content, bytes) else content.encode()
    framed = len(written).to_bytes(8, "little") + written + bytes(room)
    return lambda folder: replace(folder / WEIGHTS, framed)


def replace(path: Path, content: bytes) -> None:
    """Put the content there, whatever is there now."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def special(name: str, make: Callable[[Path], object]) -> Spoil:
    """Something else than a file in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return spoil


def large(name: str) -> Spoil:
    """A file of 3 GiB, most of it a hole."""
    return special(name, lambda path: (path.write_bytes(b"{"), os.truncate(path, 3 * 2**30)))


def many(count: int) -> str:
    """A header of so many tensors, all in the same place."""
    return "{" + ",".join(f'"{number}":{{{TENSOR}}}' for number in range(count)) + "}"


def to_many(count: int) -> str:
    """An index that names a file for each of so many tensors."""
    files = ",".join(f'"{number}":"{number}.safetensors"' for number in range(count))
    return f'{{"weight_map": {{{files}}}}}'


BROKEN: dict[str, tuple[str, Spoil]] = {
    "config nested deep": (CONFIG, config(DEEP)),
    "config nested deep inside": (CONFIG, setting(f'"x": {DEEP}')),
    "config a list": (CONFIG, config("[1]")),
    "config no text": (CONFIG, config(b"\xff\xfe\x00")),
    "config empty": (CONFIG, config("")),
    "config with a number of 5,000 digits": (CONFIG, setting(f'"vocab_size": {"9" * 5000}')),
    "config with 10**400 layers": (CONFIG, setting(f'"num_hidden_layers": 1{"0" * 400}')),
    "config with 2**63 words": (CONFIG, setting(f'"vocab_size": {2**63}')),
    "config with a share that is none": (CONFIG, setting('"partial_rotary_factor": NaN')),
    "config with an infinite share": (CONFIG, setting('"partial_rotary_factor": 1e999')),
    "config with no layers": (CONFIG, setting('"num_hidden_layers": {"a": 1}')),
    "config a pipe": (CONFIG, special(CONFIG, os.mkfifo)),
    "config a folder": (CONFIG, special(CONFIG, Path.mkdir)),
    "config a link to itself": (CONFIG, special(CONFIG, lambda path: path.symlink_to(path))),
    "config a device": (CONFIG, special(CONFIG, lambda path: path.symlink_to("/dev/zero"))),
    "config of 3 GiB": (CONFIG, large(CONFIG)),
    "index nested deep": (INDEX, index(f'{{"weight_map": {DEEP}}}')),
    "index nested deep beside": (INDEX, index(f'{{"metadata": {DEEP}, "weight_map": {{"a": "{WEIGHTS}"}}}}')),
    "index without a map": (INDEX, index('{"metadata": {}}')),
    "index with a list": (INDEX, index('{"weight_map": ["model.safetensors"]}')),
    "index with lists for names": (INDEX, index('{"weight_map": {"a": ["model.safetensors"]}}')),
    "index with an empty map": (INDEX, index('{"weight_map": {}}')),
    "index with NaN": (INDEX, index('{"weight_map": {"a": NaN}}')),
    "index that is a list": (INDEX, index("[]")),
    "index to outside": (INDEX, index('{"weight_map": {"a": "../../etc/x.safetensors"}}')),
    "index to an absolute path": (INDEX, index('{"weight_map": {"a": "/etc/passwd"}}')),
    "index to itself": (INDEX, index(f'{{"weight_map": {{"a": "{INDEX}"}}}}')),
    "index to a name with escapes": (INDEX, index('{"weight_map": {"a": "\\u001b]0;owned\\u0007\\u0000"}}')),
    "index with half a character": (INDEX, index('{"weight_map": {"a": "\\ud800.safetensors"}}')),
    "index to a name too long": ("missing", index(f'{{"weight_map": {{"a": "{"x" * 5000}.safetensors"}}}}')),
    "index a pipe": (INDEX, special(INDEX, os.mkfifo)),
    "index of 3 GiB": (INDEX, large(INDEX)),
    "header nested deep": (WEIGHTS, header(f'{{"a": {DEEP}}}')),
    "header with deep metadata": (WEIGHTS, header(f'{{"__metadata__": {DEEP}, "a": {{{TENSOR}}}}}')),
    "header a list": (WEIGHTS, header("[1, 2]")),
    "header no text": (WEIGHTS, header(b'{"\xff": {}}')),
    "header with a list for a tensor": (WEIGHTS, header('{"a": [1]}')),
    "header with null for a tensor": (WEIGHTS, header('{"a": null}')),
    "header with a word for a shape": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": "ab"}}}}')),
    "header with NaN in a shape": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": [NaN]}}}}')),
    "header with Infinity for a place": (
        WEIGHTS,
        header(f'{{"a": {{{TENSOR}, "data_offsets": [0, Infinity]}}}}'),
    ),
    "header with 2**63 numbers": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": [{2**63}]}}}}')),
    "header with 10**400 numbers": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": [1{"0" * 400}]}}}}')),
    "header with more numbers than bytes": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": [1000, 1000]}}}}')),
    "header with a negative dimension": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": [-8]}}}}')),
    "header with a negative place": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "data_offsets": [-16, 0]}}}}')),
    "header with an end before its begin": (
        WEIGHTS,
        header(f'{{"a": {{{TENSOR}, "data_offsets": [16, 0]}}}}'),
    ),
    "header with one offset": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "data_offsets": [16]}}}}')),
    "header with an object for a type": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "dtype": {{}}}}}}')),
    "header with escapes for a type": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "dtype": "\\u001b[2J"}}}}')),
    "header with a thousand dimensions": (WEIGHTS, header(f'{{"a": {{{TENSOR}, "shape": {[1] * 1000}}}}}')),
    "tensors beyond the file": (WEIGHTS, header(f'{{"a": {{{TENSOR}}}}}', room=3)),
    "tensors in one place": (WEIGHTS, header(many(1000))),
    "header with more tensors than a model has": (WEIGHTS, header(many(300_000))),
    "header with a name of a million points": (WEIGHTS, header(f'{{"{"." * 1_000_000}": {{{TENSOR}}}}}')),
    "index with a name of a million points": (
        INDEX,
        index(f'{{"weight_map": {{"{"." * 1_000_000}": "{WEIGHTS}"}}}}'),
    ),
    "index to more files than a model has": ("6000 files", index(to_many(6000))),
    "header longer than the file": (WEIGHTS, special(WEIGHTS, lambda path: path.write_bytes(b"\xff" * 7))),
    "header of 2**63 bytes": (WEIGHTS, special(WEIGHTS, lambda path: path.write_bytes(b"\xff" * 16))),
    "weights a pipe": (WEIGHTS, special(WEIGHTS, os.mkfifo)),
    "weights a folder": (WEIGHTS, special(WEIGHTS, Path.mkdir)),
    "weights a device": (WEIGHTS, special(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    "weights a link to nowhere": (WEIGHTS, special(WEIGHTS, lambda path: path.symlink_to("nowhere"))),
}
"""What is wrong → the file that must be named, and how it is made so."""
ODD: dict[str, Spoil] = {
    "Infinity where Mamba's authors wrote it": setting('"time_step_limit": [0.0, Infinity]'),
    "a type nobody knows": header(f'{{"a": {{{TENSOR}, "dtype": "F2_X"}}}}'),
    "a tensor twice": header(f'{{"a": {{{TENSOR}}}, "a": {{{TENSOR}}}}}'),
    "a layer with a number of 400 digits": header(f'{{"layers.{"9" * 400}.w": {{{TENSOR}}}}}'),
    "a tensor of no numbers": header('{"a": {"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'),
    "an architecture that is a list": setting('"architectures": [[]]'),
    "an architecture with escapes": setting('"architectures": ["\\u001b]0;owned\\u0007"]'),
    "half a character": setting(
        '"architectures": ["\\ud800"], "quantization_config": {"quant_method": "\\ud800"}'
    ),
    "lists where objects belong": setting('"text_config": [], "quantization_config": [], "rope_scaling": []'),
    "layers of layers": setting('"layer_types": [[["linear"]], null, 3]'),
    "a broken generation_config": lambda folder: replace(folder / "generation_config.json", DEEP.encode()),
    "names in another language": lambda folder: write_safetensors(folder / "模型.safetensors", {"w": (1,)}),
    "a name that is no text": lambda folder: write_safetensors(
        folder / os.fsdecode(b"\xff.safetensors"), {"w": (1,)}
    ),
}
"""What is odd and no fault."""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_CACHE": str(folder / "hub")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "Unexpected" not in said
    assert "\x1b" not in said
    assert not list(folder.rglob("crashes/*"))
    return done


@pytest.mark.parametrize("kind", [*BROKEN])
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
    names, spoil = BROKEN[kind]
    spoil(write_model(tmp_path / "m", QWEN))
    done = run(tmp_path, "advise", "./m")
    if names == CONFIG and done.returncode:
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    else:
        assert done.returncode == 0, done.stderr
    assert names in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [*ODD])
def test_what_is_only_odd_is_estimated(tmp_path: Path, kind: str) -> None:
    ODD[kind](write_model(tmp_path / "m", QWEN))
    done = run(tmp_path, "advise", "--json", "./m")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["estimates"]
    assert found["weights_bytes"] is not None
    run(tmp_path, "advise", "./m")


def test_broken_neighbours_are_named_and_the_others_get_their_advice(tmp_path: Path) -> None:
    write_model(tmp_path / "good", QWEN)
    models = {"good": {"model": "./good"}}
    for number, (_, spoil) in enumerate(BROKEN.values()):
        spoil(write_model(tmp_path / f"bad{number}", QWEN, {"w": (1,)}))
        models[f"bad{number}"] = {"model": f"./bad{number}"}
    described = {"simulated_gpus": [{"name": "Test", "memory": "800GiB"}], "models": models}
    (tmp_path / "vllm-sleep-tui.yaml").write_text(json.dumps(described))
    done = run(tmp_path, "advise", "--json")
    assert done.returncode == 0, done.stderr
    advice = {model["name"]: model for model in json.loads(done.stdout)["models"]}
    assert advice["good"]["verdict"] not in ("broken files", "start it once")
    for number, (kind, (names, _)) in enumerate(BROKEN.items()):
        found = advice[f"bad{number}"]
        if kind != "config with no layers":  # of which the weights are as they should be
            assert (found["verdict"], found["level"]) == ("broken files", None), kind
            assert names in found["why"], kind


@pytest.mark.parametrize("kind", ["config a pipe", "config a device", "config nested deep", "weights a pipe"])
def test_other_verbs_that_look_into_it_end_too(tmp_path: Path, kind: str) -> None:
    BROKEN[kind][1](write_model(tmp_path / "m", QWEN))
    cached = tmp_path / "hub/models--org--name"
    BROKEN[kind][1](write_model(cached / "snapshots/abc", QWEN))
    (cached / "refs").mkdir()
    os.mkfifo(cached / "refs/main")
    described = {
        "vllm_command": [sys.executable],
        "simulated_gpus": [{"name": "Test", "memory": "80GiB"}],
        "models": {
            "m": {"model": "./m"},
            "hub": {"model": "org/name"},
            "nobody": {"model": "~nobody-here/x"},
        },
    }
    (tmp_path / "vllm-sleep-tui.yaml").write_text(json.dumps(described))
    assert run(tmp_path, "doctor").returncode in (0, 1)
    assert run(tmp_path, "advise").returncode == 0
    assert run(tmp_path, "init", "--force").returncode == 0
