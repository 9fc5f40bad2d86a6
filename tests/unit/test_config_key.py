"""The key of a server: by the name of its variable or file, never written out, never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_config_file import ONE, load_text
from vllm_sleep_tui.config.schema import schema
from vllm_sleep_tui.errors import UsageError

KEYED = "models:\n  far:\n    url: http://127.0.0.1:8000\n"


def test_a_key_is_read_from_its_variable_or_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "sk-from-variable")
    monkeypatch.setenv("KEYS", str(tmp_path))
    (tmp_path / "far.key").write_text("sk-from-file\n")
    for line, key in {
        'api_key: "${FAR_KEY}"': "sk-from-variable",
        "api_key_file: far.key": "sk-from-file",
        'api_key_file: "${KEYS}/far.key"': "sk-from-file",
    }.items():
        loaded = load_text(tmp_path, f"{KEYED}    {line}\n")
        assert loaded.config.models["far"].api_key == key
        assert key not in f"{loaded!r} {loaded.config.models['far']}"


@pytest.mark.parametrize(
    ("lines", "words"),
    {
        "written out": ("api_key: sk-very-secret", "a key is not written here"),
        "half written out": ('api_key: "sk-very-secret-${FAR_KEY}"', "a key is not written here"),
        "a number": ("api_key: 123456789", "a key is not written here"),
        "a mapping": ("api_key: {sk-very-secret: 1}", "a key is not written here"),
        "unset": ('api_key: "${NOT_SET_ANYWHERE}"', "NOT_SET_ANYWHERE is not set"),
        "empty": ('api_key: "${EMPTY}"', "empty or holds spaces"),
        "two lines": ('api_key: "${TWO_LINES}"', "empty or holds spaces"),
        "not ascii": ('api_key: "${NOT_ASCII}"', "empty or holds spaces"),
        "no such file": ("api_key_file: none.key", "there is no file"),
        "a folder": ("api_key_file: .", "there is no file"),
        "not the name of a file": ("api_key_file: [sk-very-secret]", "must be the name of a file"),
        "twice": ('api_key: "${FAR_KEY}"\n    api_key_file: far.key', "given twice"),
    }.values(),
)
def test_a_key_that_cannot_be_used_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, words: str
) -> None:
    for name, value in {
        "FAR_KEY": "k",
        "EMPTY": "",
        "TWO_LINES": "very\nsecret",
        "NOT_ASCII": "vèry",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"models\.far\.api_key") as caught:
        load_text(tmp_path, f"{KEYED}    {lines}\n")
    assert words in caught.value.what
    assert caught.value.cure
    for secret in ("very", "secret", "123456789", "vèry"):
        assert secret not in caught.value.what + caught.value.cure


def test_a_server_of_ours_may_have_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "k")
    assert load_text(tmp_path, ONE + '    api_key: "${FAR_KEY}"\n').config.models["qwen"].api_key == "k"


def test_an_editor_is_told_that_a_key_is_the_name_of_a_variable() -> None:
    model = schema()["$defs"]["ModelConfig"]["properties"]
    assert model["api_key"]["anyOf"][0]["pattern"] == r"^\$(\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)$"
    assert "api_key_file" in model
