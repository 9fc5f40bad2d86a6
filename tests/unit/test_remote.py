"""Models that span machines: their flags go through, and docs/remote.md shows configs that are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.argv import ServeSpec, serve_argv, serve_environment
from vllm_sleep_tui.errors import UsageError

PAGE = Path(__file__).parents[2] / "docs" / "remote.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def spec(**model: Any) -> ServeSpec:
    return ServeSpec(
        command=("vllm",),
        model="org/huge",
        served_name="huge",
        port=8000,
        args=model.get("args", {}),
        env=model.get("env", {}),
        gpus=(0, 1),
        utilization=None,
        guard_dir=Path("/tmp/guard"),
        tmp_dir=Path("/tmp"),
        socket=Path("/tmp/panel.sock"),
        launch_id="l",
        sleep_mode=True,
    )


@pytest.mark.parametrize("text", BLOCKS)
def test_the_pages_configs_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("BIG_KEY", "k")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".config/vllm-sleep-tui").mkdir(parents=True)
    (tmp_path / ".config/vllm-sleep-tui/big.key").write_text("k\n")
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert load(path).config.models


def test_an_attached_model_has_no_gpus_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BLOCKS[0])
    models = load(path).config.models
    assert (models["big"].gpus, models["qwen"].gpus) == ((), (0,))


@pytest.mark.parametrize(
    "flags", ["distributed-executor-backend: ray", "nnodes: 2", "nnodes: 2, node_rank: 0"]
)
def test_a_model_that_spans_machines_may_need_more_gpus_than_are_here(tmp_path: Path, flags: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"models: {{a: {{model: x/y, gpus: [0], args: {{tensor-parallel-size: 4, {flags}}}}}}}")
    assert load(path).config.models["a"].gpus == (0,)
    path.write_text("models: {a: {model: x/y, gpus: [0], args: {tensor-parallel-size: 4}}}")
    with pytest.raises(UsageError, match="1 GPU named"):
        load(path)


@pytest.mark.parametrize("args", [{"distributed-executor-backend": "ray"}, {"nnodes": 2}])
def test_its_flags_go_through_and_its_address_is_the_persons(args: dict[str, Any]) -> None:
    given = spec(args=args, env={"VLLM_HOST_IP": "10.0.0.1"})
    assert [f"--{flag}" in serve_argv(given) for flag in args] == [True]
    assert serve_environment(given, {})["VLLM_HOST_IP"] == "10.0.0.1"
    assert serve_environment(spec(env={"VLLM_HOST_IP": "10.0.0.1"}), {})["VLLM_HOST_IP"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("idle: {stop_after: 2h}", "models.a.idle.stop_after: a server given by `url:` is not stopped"),
        ("level: none, idle: {sleep_after: 2h}", "models.a.idle.sleep_after: a server given by `url:` with"),
    ],
)
def test_an_idleness_that_an_attached_server_cannot_keep_is_an_error(
    tmp_path: Path, more: str, words: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"models: {{a: {{url: 'http://h:1', {more}}}}}")
    with pytest.raises(UsageError, match=re.escape(words)):
        load(path)
