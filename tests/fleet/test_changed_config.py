"""A config that changes, or is read otherwise by a newer version, while its servers run."""

from __future__ import annotations

from collections.abc import Callable

from tests.fleet.conftest import Box, seen
from vllm_sleep_tui.fleet.states import State


async def test_what_a_running_server_takes_is_known_after_a_change_of_its_arguments(
    box: Callable[..., Box],
) -> None:
    models = {name: {"model": "sim/4GiB"} for name in ("a", "b")}
    machine = box(models)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
    for model in models.values():
        model["args"] = {"max-model-len": 2048, "seed": 1}
    machine.write(models, ["24GiB"])
    async with machine.open() as fleet:
        await fleet.switch("b")  # by an estimate of its new arguments it would not fit beside a sleeper
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.ASLEEP, State.AWAKE)
        await fleet.sleep("b")
        await fleet.wake("b")
        await fleet.stop(["a", "b"], force=True)
