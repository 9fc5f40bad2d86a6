"""Generated config files: each is read, or refused with file and line; what is read can be worked with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.types import Config, GatewayConfig, IdleConfig, ModelConfig, SimulatedGpuConfig
from vllm_sleep_tui.engine.argv import ServeSpec, serve_argv, serve_environment
from vllm_sleep_tui.engine.serve_args import RESERVED
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.supervision.idle import poll_seconds
from vllm_sleep_tui.sizing.budget import fixed_utilization, level_for, utilization
from vllm_sleep_tui.sizing.estimate import estimated_weights
from vllm_sleep_tui.sizing.footprints import digest

KINDS = (Config, ModelConfig, IdleConfig, GatewayConfig, SimulatedGpuConfig)
KEYS = sorted({name for kind in KINDS for name in kind.__struct_fields__})
FLAGS = ["max-model-len", "tensor-parallel-size", "pipeline_parallel_size", "gpu-memory-utilization", "-tp"]
WORDS = ["auto", "none", "vllm", "127.0.0.1", "10m", "24GiB", "on-failure", "x/y", "./x", "~/x", "", "null"]
URLS = ["http://127.0.0.1:8000", "http://h:99999", "https://[::1", "ftp://x", "http://u:p@h", "http://h:8/v1"]
TEXTS = st.sampled_from([*WORDS, *URLS, "${HOME}", "${NOPE}", "${", "\x00", "\x1b[31m", "\ud800", "a" * 70])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70_000),
    st.sampled_from([2**63, -(2**64), 10**400, 0.5, 1e308, float("inf"), float("nan")]),
    TEXTS,
    st.text(max_size=8),
)
NAMES = st.one_of(st.sampled_from([*KEYS, *FLAGS, *RESERVED]), st.text(max_size=8))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
MODEL = st.fixed_dictionaries(
    {"model": st.just("x/y") | TEXTS},
    optional={
        "url": st.sampled_from(URLS),
        "gpus": st.lists(st.integers(-1, 4), max_size=3) | ANYTHING,
        "level": st.sampled_from(["auto", 1, 2, "none", 3, True]),
        "args": st.dictionaries(NAMES, SCALARS, max_size=3),
        "env": st.dictionaries(NAMES, TEXTS, max_size=2),
        "port": st.integers(0, 70_000) | ANYTHING,
        "idle": st.dictionaries(st.sampled_from(["sleep_after", "stop_after"]), TEXTS | ANYTHING),
        "restart": TEXTS,
    },
)
FILES = st.one_of(
    st.fixed_dictionaries(
        {
            "models": st.dictionaries(
                st.sampled_from(["a", "b", "c"]) | st.text(max_size=5), MODEL, max_size=3
            )
        },
        optional={key: ANYTHING for key in KEYS if key != "models"},
    ),
    st.dictionaries(NAMES, ANYTHING, max_size=4),
    ANYTHING,
)
GOOD = """\
vllm_command: [vllm]
models:
  qwen: &q {model: Qwen/Qwen3-0.6B, gpus: [0], level: auto, args: {max-model-len: 8192}}
  phi:
    <<: *q
    port: 8001
    idle: {sleep_after: 10m}
  far: {url: "http://127.0.0.1:8000"}
gateway: {port: 8800}
simulated_gpus: [{name: Demo, memory: 24GiB}]
"""


def use(loaded: LoadedConfig) -> None:
    """What is done with every config that was read, before anything is started."""
    for name, model in loaded.config.models.items():
        poll_seconds(model.idle)
        digest(model)
        estimated_weights(model, loaded.path.parent)
        utilization(name, loaded.config, dict.fromkeys(model.gpus, 2**34), {}, {})
        level_for(model, 2**30, 2**35, 2**36)
        spec = ServeSpec(
            command=loaded.config.vllm_command,
            model=model.model or "",
            served_name=name,
            port=8000,
            args=model.args,
            env=model.env,
            gpus=model.gpus,
            utilization=fixed_utilization(model),
            guard_dir=Path("/tmp/guard"),
            tmp_dir=Path("/tmp"),
            socket=Path("/tmp/panel.sock"),
            launch_id="l",
            sleep_mode=model.level != "none",
        )
        words = [*serve_argv(spec), *(f"{k}={v}" for k, v in serve_environment(spec, {}).items())]
        # What cannot be handed to a process would end the keeper instead of the start.
        assert not any("\0" in word for word in words)
        for word in words:
            word.encode("utf-8")


def read(path: Path) -> None:
    complaint = None
    try:
        use(load(path))
    except UsageError as error:
        complaint = error
    if complaint is not None:
        assert str(path) in complaint.what
        assert complaint.cure
        assert "\n" not in complaint.what


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "c.yaml"


@settings(max_examples=600)
@given(FILES)
@example({"models": {"a": {"model": "x/y", "args": {"gpu-memory-utilization": 10**400}}}})
@example({"models": {"a": {"model": "x/y", "args": {"gpu-memory-utilization": float("nan")}}}})
@example({"models": {"a": {"model": "x\0y"}}})
@example({"models": {"a": {"model": "x/y", "args": {"max-model-len": 10**400}}}})
@example({"models": {"a": {"model": "x/y", "args": {"-tp": 10**20}}}})
@example({"models": {"a": {"model": "x/y", "env": {"A": "\0"}}}})
@example({"models": {"a": {"model": "x/y", "args": {"seed": "\0"}}}})
@example({"models": {"a": {"model": "x/y", "args": {"seed": [{"a": "\ud800"}]}}}})
@example({"vllm_command": ["vl\0lm"], "models": {"a": {"model": "x/y"}}})
@example({"models": {"a": {"url": "http://h:8000/\0"}}})
def test_no_generated_config_ends_in_anything_but_a_config_or_its_error(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
    read(path)


@settings(max_examples=600)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(GOOD)),
            st.integers(0, 12),
            st.one_of(
                st.text(max_size=6),
                st.sampled_from(
                    [
                        "\n",
                        "  ",
                        "\t",
                        ": ",
                        "- ",
                        "&q ",
                        "*q",
                        "<<: ",
                        "!!python/object ",
                        "? ",
                        "|",
                        ">",
                        "{",
                        "]",
                    ]
                ),
                st.sampled_from(
                    ["%YAML 9.9\n", "---\n", "...\n", "!!binary AA==", "2020-01-01", "0x_", "1e999", "~"]
                ),
            ),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_no_slip_of_the_hand_in_a_good_config_ends_in_anything_else(
    path: Path, slips: list[tuple[int, int, str]]
) -> None:
    text = GOOD
    for at, cut, put in slips:
        text = text[:at] + put + text[at + cut :]
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    read(path)


@settings(max_examples=300)
@given(st.binary(max_size=80))
def test_no_bytes_end_in_anything_else(path: Path, content: bytes) -> None:
    path.write_bytes(b"models: {a: {model: x/y}}\n" + content)
    read(path)
