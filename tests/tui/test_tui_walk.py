"""How many files somebody opens who follows one switch from the key to the screen."""

from __future__ import annotations

import re
from pathlib import Path
from types import FrameType

from screen_text import until
from test_tui_real_fleet import real_panel, row_of
from walks import Walks, function_of

from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load

DOCS = Path(__file__).parents[2] / "docs" / "architecture.md"
MOST_FILES = 12


def wakes(frame: FrameType) -> bool:
    """Whether this is the request that wakes a model."""
    return function_of(frame) == "engine/wire:call" and "wake_up" in str(frame.f_locals.get("target"))


async def test_a_switch_goes_from_the_key_to_the_screen_through_few_modules_and_back_into_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "state").mkdir()
    walks = Walks(
        {
            "request": wakes,
            "look": lambda frame: function_of(frame) == "fleet/observe/supervised:observe",
            "row": lambda frame: function_of(frame) == "tui/widgets/models:row",
        }
    )
    async with real_panel(load(write_demo(tmp_path / "demo", 40)), tmp_path / "state") as (pilot, fleet):
        await fleet.start(["qwen", "phi"])
        await pilot.press("down")
        with walks.tracing():
            await pilot.press("enter")
            await until(pilot, lambda: "● awake" in row_of(pilot, "phi"), "phi awake")
    (request,) = walks.seen["request"]
    (look,) = {walk for walk in walks.seen["look"] if walk[0].startswith("tui/")}
    (row,) = walks.seen["row"]
    for walk in (request, look, row):
        assert len(walk) == len(set(walk)), walk
    walked = {*request, *look, *row}
    assert len(walked) <= MOST_FILES, sorted(walked)

    told = DOCS.read_text().partition("## The walks")[2].partition("\n## ")[0]
    assert {f"{module}.py" for module in walked} <= set(re.findall(r"[\w/]+\.py", told))
