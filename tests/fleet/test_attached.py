"""Models given by `url:`: used as far as their server allows, never started, never ended."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import CommandLine, wait_until, write_config
from tests.fleet.by_hand import vllm
from tests.fleet.conftest import LIMIT, SIMULATOR, Box, seen, until, until_state
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import OperationError, RefusedError
from vllm_sleep_tui.fleet.snapshot import ChatEvent
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.survey import read_once

MakeBox = Callable[..., Box]
FreePort = Callable[[], int]
HELLO = [{"role": "user", "content": "hello there"}]


def attached(box: MakeBox, port: int, **more: Any) -> Box:
    """A box with an attached model and one of its own."""
    theirs = {"url": f"http://127.0.0.1:{port}", **more}
    return box({"far": theirs, "own": {"model": "sim/1GiB"}})


def gpus_of(machine: Box) -> Path:
    """A folder of simulated GPUs that the box itself does not see: another machine's."""
    from vllm_sleep_tui.simulator import devices

    folder = machine.folder / "far-gpus"
    devices.create(folder, [("Far", 24 * 2**30)], ram_total_bytes=64 * 2**30)
    return folder


def said(events: list[ChatEvent]) -> str:
    return "".join(event.text for event in events)


async def test_an_attached_server_is_seen_asked_put_to_sleep_and_woken(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet:
            far = await until_state(fleet, "far", State.AWAKE)
            assert (far.vram_bytes, far.vram_by_gpu, far.ram_bytes, far.gpus) == (None, None, None, ())
            assert (far.source, far.port) == (f"http://127.0.0.1:{port}", port)
            assert "hello there" in said([event async for event in fleet.chat("far", HELLO)])
            await fleet.sleep("far")
            assert (seen(fleet, "far").state, seen(fleet, "far").level) == (State.ASLEEP, 1)
            assert fleet.predict("far").action == "wake"
            await fleet.wake("far")
            assert (seen(fleet, "far").state, seen(fleet, "far").proof) == (State.AWAKE, "proven")


async def test_level_2_of_an_attached_server_is_reloaded_and_proven(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port, level=2)
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet:
            await fleet.sleep("far")
            with pytest.raises(RefusedError, match="without a wake"):
                await fleet.sleep("far", level=1)
        async with machine.open() as fleet:
            assert (await until_state(fleet, "far", State.ASLEEP)).level == 2
            ledger = await fleet.switch("far")
            assert ledger.phases["reload"] is not None
            assert seen(fleet, "far").proof == "proven"


@pytest.mark.parametrize(
    ("flags", "version", "why"),
    [
        (("--load-format", "sharded_state"), "0.32.0", "`sharded_state` cannot load weights again"),
        (("--load-format", "dummy"), "0.32.0", "dummy weights"),
        (("--load-format", "runai_streamer"), "0.26.0", "before 0.32"),
        (("--enable-lora",), "0.26.0", "LoRA"),
    ],
)
async def test_level_2_is_refused_where_an_attached_server_could_not_come_back(
    box: MakeBox, free_port: FreePort, flags: tuple[str, ...], version: str, why: str
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, *flags, gpus=gpus_of(machine), VLLM_SIM_VERSION=version):
        async with machine.open() as fleet:
            await until_state(fleet, "far", State.AWAKE)
        refused = await command(machine, "sleep", "far", "--level", "2")
        assert refused.returncode == 1
        assert why in refused.stderr
        assert "Sleep it at level 1" in refused.stderr
        done = await command(machine, "sleep", "far", "--level", "1")
        assert done.returncode == 0, done.stderr


async def test_a_chat_with_a_sleeping_attached_server_wakes_it_and_sleeps_nobody(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet:
            await fleet.start(["own"])
            await fleet.sleep("far")
            events = [event async for event in fleet.chat("far", HELLO)]
            assert events[0].switch_seconds is not None
            assert "hello there" in said(events)
            assert (seen(fleet, "far").state, seen(fleet, "own").state) == (State.AWAKE, State.AWAKE)


async def test_what_its_own_user_does_to_an_attached_server_shows(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    machine = attached(box, port)
    other = box({"far": {"url": f"http://127.0.0.1:{port}"}})
    with vllm(port, gpus=gpus_of(machine)):
        async with machine.open() as fleet, other.open() as elsewhere:
            await until_state(fleet, "far", State.AWAKE)
            await elsewhere.sleep("far", level=2)
            assert (await until_state(fleet, "far", State.ASLEEP)).level == 2
    async with machine.open() as fleet:
        await until(lambda: "Nothing answers" in (seen(fleet, "far").reason or ""))
        assert seen(fleet, "far").state is State.STOPPED


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
async def test_an_attached_server_is_not_started_or_stopped_and_left_out_of_all(
    box: MakeBox, free_port: FreePort, verb: str
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port):
        async with machine.open() as fleet:
            with pytest.raises(RefusedError, match="not ours to start or stop"):
                await getattr(fleet, verb)(["far"])
        done = [await command(machine, word, "--all") for word in ("start", "stop")]
        assert [(each.returncode, each.stderr.count("far")) for each in done] == [(0, 0), (0, 0)]


async def test_without_dev_endpoints_it_answers_and_refuses_to_sleep(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, VLLM_SERVER_DEV_MODE="0"):
        async with machine.open() as fleet:
            await until_state(fleet, "far", State.AWAKE)
            assert said([event async for event in fleet.chat("far", HELLO)])
            with pytest.raises(RefusedError, match="lets nobody from here sleep it") as caught:
                await fleet.sleep("far")
            assert "VLLM_SERVER_DEV_MODE=1" in caught.value.cure
            assert seen(fleet, "far").state is State.AWAKE


async def test_a_server_that_another_panel_keeps_is_seen_asleep_through_its_guard(
    box: MakeBox, free_port: FreePort
) -> None:
    keeps = box({"own": {"model": "sim/1GiB", "port": (port := free_port())}})
    watches = box({"far": {"url": f"http://127.0.0.1:{port}"}})
    async with keeps.open() as keeper, watches.open() as fleet:
        await keeper.start(["own"])
        await until_state(fleet, "far", State.AWAKE)
        assert said([event async for event in fleet.chat("far", HELLO)])
        with pytest.raises(RefusedError, match="lets nobody"):
            await fleet.sleep("far")
        await keeper.sleep("own", level=2)
        assert (await until_state(fleet, "far", State.ASLEEP)).level == 2
        with pytest.raises(RefusedError, match="lets nobody from here wake it"):
            await fleet.switch("far")


async def test_a_sleep_is_refused_where_nothing_answers(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    async with attached(box, port).open() as fleet:
        for attempt in (fleet.sleep("far"), fleet.wake("far"), fleet.switch("far")):
            with pytest.raises(RefusedError, match=f"Nothing answers at 127.0.0.1:{port}"):
                await attempt
        with pytest.raises(RefusedError, match="Nothing answers"):
            _ = [event async for event in fleet.chat("far", HELLO)]
        assert fleet.predict("far").action == "refused"


async def test_a_server_that_wakes_and_answers_nonsense_is_named_and_left_running(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port, gpus=gpus_of(machine), VLLM_SIM_FAULTS="garbage_after_wake") as process:
        async with machine.open() as fleet:
            await fleet.sleep("far")
            with pytest.raises(OperationError, match="does not answer as before it slept"):
                await fleet.wake("far")
            assert process.poll() is None


async def command(machine: Box, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb over the box."""
    link = machine.folder / "vllm-sleep-tui"
    if not link.exists():
        link.symlink_to(machine.state_dir)
    env = os.environ | {"XDG_STATE_HOME": str(machine.folder)}
    argv = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *words]
    return await asyncio.to_thread(
        subprocess.run, argv, env=env, capture_output=True, text=True, timeout=60, check=False
    )


async def status(machine: Box) -> dict[str, Any]:
    """What `status --json` says of its first model."""
    found: dict[str, Any] = json.loads((await command(machine, "status", "--json")).stdout)["models"][0]
    return found


async def test_status_shows_it_as_its_contract_says(box: MakeBox, free_port: FreePort) -> None:
    port = free_port()
    machine = attached(box, port)
    with vllm(port):
        # A look gives it 0.3 s: on a busy machine not every one comes in time.
        async with asyncio.timeout(LIMIT):
            while (shown := await status(machine))["state"] != "awake":
                assert "did not answer within" in shown["reason"]
            assert (shown["vram_bytes"], shown["pid"], shown["port"]) == (None, None, port)
            while "far    awake" not in (await command(machine, "status")).stdout:
                pass
    shown = await status(machine)
    assert (shown["state"], shown["vram_bytes"]) == ("stopped", None)
    assert "Nothing answers" in shown["reason"]


@pytest.mark.parametrize("kind", ["silent", "dripping"])
def test_a_server_that_never_comes_to_an_end_holds_status_up_no_longer_than_its_limit(
    box: MakeBox, kind: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def serve() -> None:
            while not ended.is_set():
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(peer,), daemon=True).start()

        def drip(peer: socket.socket) -> None:
            with peer:
                try:
                    while kind == "dripping" and not ended.wait(0.02):
                        peer.sendall(b"H")
                    ended.wait(60)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        port = listening.getsockname()[1]
        machine = box({"a": {"url": f"http://127.0.0.1:{port}"}})
        began = time.monotonic()
        far = read_once(load(machine.config), machine.state_dir).model("a")
        took = time.monotonic() - began
        ended.set()
    assert far.state is State.STOPPED
    assert "did not answer within 0.3 s" in (far.reason or "")
    assert took < 30  # the server's own end, in 60 s, was not waited for


async def test_serve_that_stops_all_at_its_end_leaves_attached_servers_alone(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = box({"far": {"url": f"http://127.0.0.1:{port}"}, "own": {"model": "sim/1GiB"}})
    with vllm(port) as process:
        async with machine.open() as fleet:
            await fleet.start(["own"])
            await until_state(fleet, "far", State.AWAKE)
        (machine.folder / "vllm-sleep-tui").symlink_to(machine.state_dir)
        argv = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config)]
        log = machine.folder / "serve.log"
        with log.open("wb") as file:
            serve = subprocess.Popen(
                [*argv, "serve", "--stop-on-exit"],
                env=os.environ | {"XDG_STATE_HOME": str(machine.folder)},
                stdout=file,
                stderr=file,
            )
        await until(lambda: "far: awake" in log.read_text())
        serve.terminate()
        assert await asyncio.to_thread(serve.wait, 30) == 0
        async with machine.open() as fleet:
            assert seen(fleet, "own").state is State.STOPPED
        assert process.poll() is None


@pytest.mark.usefixtures("own_orphans")
@pytest.mark.parametrize("how", ["stop --all", "serve --stop-on-exit"])
def test_a_server_of_a_model_that_got_a_url_meanwhile_is_stopped_with_all(
    tmp_path: Path, free_port: FreePort, how: str
) -> None:
    config = tmp_path / "vllm-sleep-tui.yaml"
    model = {"model": "sim/1GiB", "args": {"max-model-len": 2048}, "env": {"VLLM_SIM_TIMES": "instant"}}
    gpus = [{"name": "Test", "memory": "24GiB"}]
    far = {"url": f"http://127.0.0.1:{free_port()}"}
    machine = CommandLine(
        write_config(config, SIMULATOR, {"a": model}, simulated_gpus=gpus), tmp_path / "state"
    )
    machine("start", "a")
    pid = machine.status()["a"]["pid"]
    write_config(config, SIMULATOR, {"a": far}, simulated_gpus=gpus)
    assert f"still runs, pid {pid}" in machine.status()["a"]["reason"]
    if how == "stop --all":
        assert machine.run("stop", "--all").returncode == 0
    else:
        serve = machine.begin("serve", "--stop-on-exit")
        assert serve.stdout is not None
        while " a: " not in (line := serve.stdout.readline()):
            assert line
        serve.terminate()
        serve.communicate(timeout=120)
    assert "still runs" not in machine.status()["a"]["reason"]
    wait_until(lambda: not psutil.pid_exists(pid), seconds=60, what="its keeper has seen its end")
