"""The panel in a browser: who gets it, and that it is the panel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psutil
import pytest
from browser import CHROMIUM, opened

from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.text import clean

DEADLINE = 60.0
PASTE = """
const pasted = new DataTransfer();
pasted.setData("text/plain", "🐑".repeat(300_000));
const event = new ClipboardEvent("paste", {clipboardData: pasted, bubbles: true});
document.querySelector(".xterm-helper-textarea").dispatchEvent(event);
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`web --read-only` over the demo, and the link that it printed."""
    with served(tmp_path, write_demo(tmp_path / "demo", 40), "--read-only") as started:
        yield started


@contextlib.contextmanager
def served(tmp_path: Path, config: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), "web", *options]
    with subprocess.Popen(
        command,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


async def seen(tab: aiohttp.ClientWebSocketResponse, *texts: str) -> None:
    """Wait until the panel has drawn all these texts."""
    drawn = b""
    async with asyncio.timeout(DEADLINE):
        while not all(text in clean(drawn.decode(errors="replace")) for text in texts):
            message = await tab.receive()
            assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), clean(drawn.decode())
            drawn += message.data if isinstance(message.data, bytes) else b""


async def panel_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The one panel of the server, once those of closed tabs are gone."""
    async with asyncio.timeout(DEADLINE):
        while len(panels := psutil.Process(process.pid).children()) != 1:
            await asyncio.sleep(0.05)
    return panels[0]


async def test_only_who_has_the_link_gets_a_panel_and_none_outlives_the_server(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, link = server
    address, token = link.split("#token=")
    port = urlsplit(address).port
    assert urlsplit(address).hostname == "127.0.0.1"
    assert {one.laddr.ip for one in psutil.Process(process.pid).net_connections("tcp")} == {"127.0.0.1"}
    async with aiohttp.ClientSession() as session:
        for headers in (
            {"Host": f"evil.example:{port}"},
            {"Origin": "http://evil.example"},
            {"Origin": f"http://127.0.0.1:{(port or 0) + 1}"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            for path in ("", "page.js", f"ws/{token}?width=80&height=24"):
                async with session.get(address + path, headers=headers) as answer:
                    assert answer.status == 403, (headers, path)
        for path in ("ws/", "ws/x", f"ws/{token[:-1]}", "static/../server.py"):
            async with session.get(address + path) as answer:
                assert answer.status in (403, 404), path
        async with session.get(address) as answer:
            page = await answer.text()
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert token not in page
        assert "https://" not in page
        async with session.ws_connect(f"{address}ws/{token}?width=120&height=40") as tab:
            await seen(tab, "READ-ONLY", "SIMULATED", "coder")
            for odd in ("", "[]", "[1]", '["stdin"]', '["resize", {"width": "x"}]', "{", '["ping", 1]'):
                await tab.send_str(odd)
            await tab.send_str(json.dumps(["stdin", "?"]))
            await seen(tab, "Follow its log")
            await tab.send_str(json.dumps(["stdin", "\x1b"]))
            await seen(tab, "READ-ONLY", "coder")  # the help is closed, and a q no part of the escape
            async with asyncio.timeout(DEADLINE):  # a key that comes while the help goes may be lost with it
                kind = None
                while kind is not aiohttp.WSMsgType.CLOSE:
                    await tab.send_str(json.dumps(["stdin", "q"]))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(2):
                            while (kind := (await tab.receive()).type) is not aiohttp.WSMsgType.CLOSE:
                                pass
        async with session.ws_connect(f"{address}ws/{token}?width=80&height=24") as tab:
            await seen(tab, "READ-ONLY")
            panel = await panel_of(process)
            assert token not in " ".join([*panel.cmdline(), *panel.environ().values()])
            process.kill()  # nobody tells the panel: it sees the end of its pipe
            await asyncio.to_thread(panel.wait, DEADLINE)


async def test_a_closed_tab_stops_no_start_and_a_panel_that_dies_leaves_no_tab_waiting(
    tmp_path: Path,
) -> None:
    config = write_demo(tmp_path / "demo", 8)
    state = tmp_path / "state/vllm-sleep-tui"
    with served(tmp_path, config) as (process, link):
        address, token = link.split("#token=")
        way = f"{address}ws/{token}?width=120&height=40"
        try:
            async with aiohttp.ClientSession() as session:
                async with session.ws_connect(way) as tab:
                    await seen(tab, "coder")
                    await tab.send_str(json.dumps(["stdin", "u"]))
                    await seen(tab, "loading")
                    panel = await panel_of(process)
                await asyncio.to_thread(panel.wait, DEADLINE)
                async with session.ws_connect(way) as tab:
                    await seen(tab, "awake")  # the next panel carries the start on
                    panel = await panel_of(process)
                    panel.kill()
                    async with asyncio.timeout(DEADLINE):
                        while (await tab.receive()).type is not aiohttp.WSMsgType.CLOSE:
                            pass
        finally:
            async with Fleet(load(config), state) as fleet:
                await fleet.stop(["qwen"], force=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium-headless-shell")
async def test_chromium_shows_it_takes_keys_and_asks_nobody_else(
    server: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, link = server
    address = link.split("#")[0]
    async with opened(link, tmp_path / "profile") as page:
        await page.until(lambda: b"READ-ONLY" in page.received, "the panel")
        await page.until(lambda: "coder" in clean(page.received.decode(errors="replace")), "its models")
        assert await page.value("location.href") == address
        await page.value(PASTE)  # more than one message may have
        page.received = b""
        await page.press("?")
        await page.until(
            lambda: "Follow its log" in clean(page.received.decode(errors="replace")), "the help"
        )
        await page.picture(tmp_path / "browser.png")
        assert {urlsplit(asked).netloc for asked in page.asked if "://" in asked} == {urlsplit(link).netloc}
        process.terminate()
        await page.until(lambda: process.poll() is not None, "the end of the server")
        assert process.returncode == 0
        words = "getComputedStyle(document.getElementById('ended')).display"
        async with asyncio.timeout(DEADLINE):
            while await page.value(words) != "block":
                await page.read()
