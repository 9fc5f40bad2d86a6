"""What happened is told, across processes, and kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable

from tests.command_line import CommandLine
from tests.fleet.conftest import Box, record_of
from vllm_sleep_tui.fleet.events import FleetEvent, Kind, Outcome
from vllm_sleep_tui.fleet.states import State


async def test_a_subscriber_hears_what_this_fleet_and_a_verb_do(box: Callable[..., Box]) -> None:
    machine = box({"a": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB"}})
    panel = CommandLine(machine.config, machine.folder)
    machine.state_dir = machine.folder / "vllm-sleep-tui"  # where the verbs have it
    heard: list[FleetEvent] = []

    async def until(*wanted: tuple[str, str | None, State | Outcome]) -> None:
        """Listen until these have come, in this order."""
        left = list(wanted)
        async for event in events:
            heard.append(event)
            if left and (event.model, event.operation, event.outcome or event.state) == left[0]:
                left.pop(0)
            if not left:
                return

    async with machine.open() as fleet:
        events = fleet.events()
        await fleet.start(["a"])
        await asyncio.wait_for(
            until(("a", "start", State.STARTING), ("a", "start", State.AWAKE), ("a", "start", Outcome.DONE)),
            60,
        )
        verb = await asyncio.to_thread(panel.run, "switch", "b")
        assert verb.returncode == 0, verb.stderr
        await asyncio.wait_for(until(("b", "switch", Outcome.DONE)), 60)
        made_room = [event for event in heard if event.detail == "for b"]
        assert [(event.model, event.state) for event in made_room] == [("a", State.FALLING_ASLEEP)]
        assert made_room[0].pid != os.getpid()

        engine = record_of(fleet, "b").engines[0].pid
        os.kill(engine, signal.SIGKILL)
        await asyncio.wait_for(until(("b", None, State.FAILED)), 60)
        assert (heard[-1].kind, "killed" in (heard[-1].detail or "")) == (Kind.FAULT, True)
        await events.aclose()
        await fleet.stop(["a"], force=True)
    assert [event.id for event in heard] == sorted({event.id for event in heard})

    shown = await asyncio.to_thread(panel.run, "events", "--json", "-n", "500")
    kept = json.loads(shown.stdout)["events"]
    assert [event["id"] for event in kept][: len(heard)] == [event.id for event in heard]
    lines = (await asyncio.to_thread(panel.run, "events", "-n", "2")).stdout.splitlines()
    assert (len(lines), "a  stop done after" in lines[-1]) == (2, True)


async def test_an_operation_that_failed_is_an_event_with_its_reason(box: Callable[..., Box]) -> None:
    machine = box({"a": {"model": "sim/1GiB", "env": {"VLLM_SIM_FAULTS": "gated"}}})
    panel = CommandLine(machine.config, machine.folder)
    assert (await asyncio.to_thread(panel.run, "start", "a")).returncode == 1
    shown = await asyncio.to_thread(panel.run, "events", "--json")
    last = json.loads(shown.stdout)["events"][-1]
    assert (last["kind"], last["outcome"], "gated" in last["detail"]) == ("operation", "failed", True)
