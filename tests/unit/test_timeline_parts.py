"""Parts of the timeline that need no screen: states, requests and tokens in cells, the switch at a moment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.fleet.past import PastSwitch, Served
from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, line_width
from vllm_sleep_tui.tui.drawing.timeline import (
    EVENT_LINES,
    Change,
    Frame,
    around,
    bars,
    cells_of_states,
    event_lines,
    nearest,
    requests_of,
    spread_over,
    title,
    tokens_of,
)

FRAME = Frame(end=100.0, seconds=100.0, cells=10)
LEVEL_2 = {
    "drain": 0.004,
    "sleep": 0.067,
    "settle": 0.001,
    "wake": None,
    "weights": 0.21,
    "reload": 1.02,
    "kv_cache": 0.04,
    "reset": 0.002,
    "prove": 0.026,
}


def entry(model: str, time: float, requests: int = 1, tokens: int = 0, seconds: float = 10) -> Served:
    return Served(
        model=model,
        time=time,
        seconds=seconds,
        requests=requests,
        prompt_tokens=tokens // 2,
        generated_tokens=tokens - tokens // 2,
    )


def switch(
    model: str, end: float, total: float = 1.0, *, phases: dict[str, float | None] | None = None
) -> PastSwitch:
    return PastSwitch(
        time=end,
        model=model,
        level=1,
        from_state=State.ASLEEP,
        times=SwitchTimes(phases={"wake": total} if phases is None else phases, total=total),
        left=(),
    )


def text(lines: list[Line]) -> list[str]:
    return ["".join(part for part, _ in line) for line in lines]


def test_a_cell_shows_the_failure_or_the_wake_that_it_holds_else_what_came_last() -> None:
    asleep, awake = Change(12.0, State.ASLEEP, 1), Change(31.0, State.AWAKE, None)
    falling, again = Change(32.0, State.FALLING_ASLEEP, 1), Change(33.0, State.ASLEEP, 1)
    failed = Change(75.0, State.FAILED, None)
    cells = cells_of_states([asleep, awake, falling, again, failed], FRAME)
    assert cells == [None, asleep, asleep, awake, again, again, again, failed, failed, failed]


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.floats(0, 80), st.integers(0, 500), st.sampled_from([10, 20]))
    ),
    st.integers(1, 130),
)
def test_however_the_cells_lie_nothing_is_counted_twice_or_lost(
    given: list[tuple[str, float, int, int]], cells: int
) -> None:
    entries = [entry(model, time, tokens=tokens, seconds=seconds) for model, time, tokens, seconds in given]
    spread = spread_over(entries, tokens_of, Frame(100.0, 100.0, cells))
    for model in "ab":
        expected = sum(tokens_of(each) for each in entries if each.model == model)
        assert abs(sum(cell.get(model, 0.0) for cell in spread) - expected) < 1e-6 * (1 + expected)


def test_what_lies_before_the_first_cell_is_left_out_and_an_entry_across_it_counts_in_part() -> None:
    spread = spread_over([entry("a", -10.0, 4), entry("a", -5.0, 4)], requests_of, FRAME)
    assert spread == [{"a": 2.0}, *({} for _ in range(9))]


def test_a_bar_is_as_high_as_its_share_of_the_highest_and_coloured_by_who_did_most() -> None:
    colors = {"a": "m0", "b": "m1"}
    spans = bars([{}, {"a": 100.0}, {"a": 20.0, "b": 30.0}, {"b": 0.01}, {"gone": 50.0}], colors)
    assert spans == [("·", "faint"), ("█", "m0"), ("▅", "m1"), ("▁", "m1"), ("▅", "others")]


def test_the_cursor_tells_the_switch_in_its_cell_or_the_nearest_one_of_that_model() -> None:
    early, late, other = switch("a", 21.0), switch("a", 58.0, total=25.0), switch("b", 41.0)
    past = [early, other, late]
    assert nearest(past, "a", FRAME, 2) is early
    assert nearest(past, "a", FRAME, 3) is late, "it began in this cell"
    assert nearest(past, "a", FRAME, 9) is late
    assert nearest(past, "b", FRAME, 0) is other
    assert nearest(past, "c", FRAME, 0) is None


def test_the_title_names_who_served_and_leaves_off_whole_what_does_not_fit() -> None:
    awake = Change(0.0, State.AWAKE, None)
    entries = around([entry("a", 30.0, 2, 1200), entry("b", 30.0, 1, 30), entry("a", 50.0)], FRAME, 3)

    def words(entries: list[Served], width: int = 80) -> str:
        return "".join(part for part, _ in title("a", "m0", awake, entries, "12:00:00", width))

    assert words(entries) == "12:00:00  a  ● awake  all: 3 requests · 1,230 tokens in 10 s  esc ends"
    assert words(entries[:1]) == "12:00:00  a  ● awake  2 requests · 1,200 tokens in 10 s  esc ends"
    assert words(entries[1:]) == "12:00:00  a  ● awake  b: 1 request · 30 tokens in 10 s  esc ends"
    assert words([]) == "12:00:00  a  ● awake  esc ends"
    assert words(entries, 54) == "12:00:00  a  ● awake  all: 3 requests · 1,230 tokens"
    assert words(entries, 40) == "12:00:00  a  ● awake"


def test_the_phases_take_two_lines_at_most_and_the_shortest_give_way() -> None:
    past = switch("qwen", 100.0, total=1.4, phases=LEVEL_2)
    first, second = text(event_lines(past, "qwen", "m0", 100.0, 100))
    assert first.startswith("  switch to qwen  ")
    assert "  1.40 s   drain 4 ms · sleep 67 ms" in first
    assert second.endswith("reload 1.02 s · kv cache 40 ms · reset 2 ms · prove 26 ms")
    for width in (44, 56, 66):
        lines = event_lines(past, "qwen", "m0", 100.0, width)
        assert len(lines) == EVENT_LINES
        assert all(line_width(line) <= width for line in lines)
        assert "reload 1.02 s" in "".join(text(lines))
        assert "settle" not in "".join(text(lines))
        assert text(lines)[1].endswith("…")


def test_a_start_has_no_phases_and_where_nothing_happened_that_is_said() -> None:
    started = PastSwitch(
        time=100.0,
        model="qwen",
        level=None,
        from_state=State.STOPPED,
        times=SwitchTimes(phases={"wake": None}, total=52.0),
        left=(),
    )
    first, second = text(event_lines(started, "qwen", "m0", 100.0, 60))
    assert first.startswith("  start of qwen")
    assert first.endswith("52.0 s")
    assert second == ""
    assert text(event_lines(None, "qwen", "m0", 100.0, 60)) == ["  no switch to qwen in this time", ""]
