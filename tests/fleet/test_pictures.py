"""Pictures from the shell: sent whole, kept by path and digest, and refused where nothing sees them."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.fleet.test_chat_verb import COMMAND, shell
from tests.tui.pty_terminal import Terminal
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.pictures import look_at


def png(columns: int, rows: int, color: bytes = b"\xff\x80\x00") -> bytes:
    """A picture in one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress((b"\0" + color * columns) * rows))
        + (chunk(b"IEND", b""))
    )


def seen(content: bytes) -> str:
    """How the simulator names a picture that came whole."""
    return hashlib.sha256(content).hexdigest()[:12]


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The demo, with the model that sees awake; the other's files say that it reads text alone."""
    folder = tmp_path_factory.mktemp("pictures")
    blind = folder / "blind"
    blind.mkdir()
    (blind / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    config = write_demo(folder, 1000)
    config.write_text(config.read_text().replace("Qwen/Qwen3-32B-AWQ", str(blind)))
    made = CommandLine(config, folder / "state")
    made("start", "phi")
    yield made
    made.close()


def test_a_picture_comes_whole_and_is_told_again_until_it_changes(line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "my photo.png"
    file.write_bytes(content := png(40, 30))
    done = shell(line, "chat", "phi", "-c", "What is this?", "--image", str(file))
    assert done.returncode == 0, done.stderr
    assert f"“What is this? [image/png {seen(content)}]”" in done.stdout
    number = line("conversations", "list").split()[0]
    assert "my photo.png · 40×30 · 0 KB" in line("conversations", "show", number)
    kept = json.loads(line("conversations", "show", number, "--json"))["turns"][0]
    digest = hashlib.sha256(content).hexdigest()
    assert kept["pictures"] == [
        {"path": str(file), "digest": digest, "kind": "image/png", "bytes": len(content), "size": [40, 30]}
    ]
    assert kept["text"] == f'What is this? @"{file}"'
    asked = ("chat", "phi", "-c", "And?", "--json")
    with_it = json.loads(shell(line, *asked).stdout)["prompt_tokens"]
    file.write_bytes(png(41, 30))  # another one: the model is not shown it for the first
    without = json.loads(shell(line, *asked).stdout)["prompt_tokens"]
    assert with_it > 256 > without - 150


def test_what_cannot_be_sent_is_said_before_anything_is_sent(line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("no picture")
    with (tmp_path / "large.png").open("wb") as large:
        large.write(png(1, 1))
        large.truncate(20 * 2**20 + 1)
    for number in range(4):
        with (tmp_path / f"{number}.png").open("wb") as large:
            large.write(png(1, 1))
            large.truncate(17 * 2**20)
    images = [part for number in range(4) for part in ("--image", str(tmp_path / f"{number}.png"))]
    done = shell(line, "chat", "phi", "hi", *images)
    assert (done.returncode, "together more than 64 MiB" in done.stderr) == (2, True)
    for name, words in {
        "none.png": "cannot be read: No such file or directory.\nName a picture's file; "
        "a word with an @ is sent as a word with a blank after the @.\n",
        "words.png": "is no picture: PNG, JPEG, GIF and WebP are sent.\n",
        "large.png": "is larger than the 20 MiB that are sent of one picture.\nMake it smaller first",
    }.items():
        done = shell(line, "chat", "phi", "hi", "--image", str(tmp_path / name))
        assert done.returncode == 2
        assert done.stderr.startswith(f"{tmp_path / name} {words}")


def test_a_model_that_reads_text_alone_is_not_started_for_a_picture(
    line: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(4, 4))
    done = shell(line, "chat", "big", "hi", "--image", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("big reads text alone: its checkpoint has no part that sees.\nAsk a model")
    assert line.status()["big"]["state"] == "stopped"
    # Nothing here tells of qwen: its server is asked, and what it refuses is said.
    done = shell(line, "chat", "qwen", "hi", "--image", str(file))
    assert done.returncode == 1
    assert "This model reads text alone: its server takes no pictures. Ask a model that sees" in done.stderr


async def test_a_model_that_reads_text_alone_goes_on_with_a_conversation_that_had_a_picture(
    line: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(4, 4))
    told = [
        {"role": "user", "content": "See", "pictures": look_at([file])},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "And?"},
    ]
    async with Fleet(load(line.config), line.state_home / "vllm-sleep-tui") as fleet:
        events = [event async for event in fleet.chat("big", told, params={"max_tokens": 20})]
        await fleet.stop(["big"])
    assert events[-1].error is None
    assert "And?" in "".join(event.text for event in events)


def test_a_picture_that_is_dropped_on_the_terminal_is_shown(line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(content := png(8, 8))
    environment = line.environment | {"XDG_STATE_HOME": str(line.state_home), "TERM": "xterm-256color"}
    command = [*COMMAND, "--config", str(line.config), "chat", "phi"]
    terminal = Terminal(command, environment, 200, 24, controlling=True)
    try:
        terminal.wait_for("phi>")
        terminal.press(f"See \x1b[200~'{file}'\x1b[201~and say.\r")
        terminal.wait_for(f'@"{file}"', f"[image/png {seen(content)}]", "tok/s")
        terminal.press("Or @none.png?\r")
        terminal.wait_for("none.png cannot be read")
        terminal.press("@nobody else?\r")
        terminal.wait_for("“@nobody else?”")
        terminal.press("\x04")
        assert terminal.end() == 0
    finally:
        terminal.close()
