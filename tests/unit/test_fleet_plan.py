"""The plan, over generated machines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.config.types import Config, ModelConfig
from vllm_sleep_tui.sizing.budget import MARGIN, Plan, utilization
from vllm_sleep_tui.sizing.placement import Neighbour, Room, make_room

GIB = 2**30
sizes = st.integers(0, 80 * GIB)


@st.composite
def neighbours(draw: st.DrawFn) -> list[Neighbour]:
    count = draw(st.integers(0, 6))
    found = []
    for number in range(count):
        gpus = draw(st.sets(st.integers(0, 3), min_size=1, max_size=4))
        awake = {gpu: draw(sizes) for gpu in gpus}
        found.append(
            Neighbour(
                name=f"m{number}",
                awake=awake,
                asleep={gpu: draw(st.integers(0, max(1, size))) for gpu, size in awake.items()},
                idle_since=draw(st.floats(0, 1e9)),
                answering=draw(st.booleans()),
                stops=draw(st.booleans()),
            )
        )
    return found


needs = st.dictionaries(st.integers(0, 3), sizes, min_size=1)
frees = st.dictionaries(st.integers(0, 3), sizes, min_size=4)


def after(room: Room, free: dict[int, int], others: list[Neighbour], gpu: int) -> int:
    return free[gpu] + sum(n.gives(gpu) for n in others if n.name in room.leaving)


@given(needs, frees, neighbours())
def test_a_plan_that_fits_frees_enough_on_every_gpu(
    need: dict[int, int], free: dict[int, int], others: list[Neighbour]
) -> None:
    room = make_room(need, free, others)
    for gpu, size in need.items():
        enough = after(room, free, others, gpu) >= size + MARGIN
        assert enough or gpu in room.missing
        assert room.free[gpu] == after(room, free, others, gpu)


@given(needs, frees, neighbours())
def test_it_gives_up_only_if_everybody_asleep_would_not_do(
    need: dict[int, int], free: dict[int, int], others: list[Neighbour]
) -> None:
    room = make_room(need, free, others)
    possible = all(
        free[gpu] + sum(n.gives(gpu) for n in others) >= size + MARGIN for gpu, size in need.items()
    )
    assert room.fits == possible


@given(needs, frees, neighbours())
def test_nobody_sleeps_in_vain(need: dict[int, int], free: dict[int, int], others: list[Neighbour]) -> None:
    room = make_room(need, free, others)
    if not room.fits:
        return
    for spared in room.leaving:
        without = {
            gpu: free[gpu] + sum(n.gives(gpu) for n in others if n.name in room.leaving and n.name != spared)
            for gpu in need
        }
        assert any(without[gpu] < need[gpu] + MARGIN for gpu in need), f"{spared} need not have slept"


def one(name: str, size: int, idle: float, *, answering: bool = False) -> Neighbour:
    return Neighbour(name=name, awake={0: size * GIB}, asleep={0: GIB}, idle_since=idle, answering=answering)


def test_the_longest_idle_sleeps_first_and_an_answering_one_last() -> None:
    others = [one("new", 10, 300.0), one("old", 10, 100.0), one("busy", 10, 50.0, answering=True)]
    assert make_room({0: 5 * GIB}, {0: 0}, others).sleeps == ("old",)
    assert make_room({0: 12 * GIB}, {0: 0}, others).sleeps == ("old", "new")


def test_models_that_fit_together_stay_awake_together() -> None:
    assert make_room({0: 5 * GIB}, {0: 6 * GIB}, [one("a", 10, 1.0)]).leaving == ()


def test_where_memory_is_not_known_every_neighbour_makes_room() -> None:
    room = make_room({0: 5 * GIB}, {0: None}, [one("a", 10, 1.0), one("b", 10, 2.0)])
    assert room.sleeps == ("a", "b")
    assert room.fits


def resting(name: str, weights: int, idle: float) -> Neighbour:
    held = {0: (weights + 1) * GIB}
    return Neighbour(
        name=name, awake=held, asleep={0: GIB}, resident=held, idle_since=idle, sleeps_already=True
    )


def keeping(name: str, size: int, weights: int, idle: float) -> Neighbour:
    resident = {0: (weights + 1) * GIB}
    return Neighbour(name=name, awake={0: size * GIB}, asleep={0: GIB}, resident=resident, idle_since=idle)


def test_weights_stay_where_they_have_room_beside_the_target() -> None:
    room = make_room({0: 6 * GIB}, {0: GIB}, [keeping("a", 11, 4, 1.0)])
    assert (room.sleeps, room.keeps) == (("a",), {"a"})
    assert room.free == {0: 7 * GIB}
    assert make_room({0: 7 * GIB}, {0: GIB}, [keeping("a", 11, 4, 1.0)]).keeps == frozenset()


def test_weights_of_the_longest_idle_give_way_to_those_used_last_and_to_nobody_else() -> None:
    last = keeping("last", 11, 4, 9.0)
    room = make_room({0: 9 * GIB}, {0: 0}, [last, resting("old", 4, 1.0)])
    assert (room.sleeps, room.keeps, room.gives_way) == (("old", "last"), {"last"}, {"old"})
    assert room.free == {0: 10 * GIB}
    room = make_room({0: 9 * GIB}, {0: 0}, [last, resting("newer", 4, 10.0)])
    assert (room.sleeps, room.keeps, room.gives_way) == (("last",), frozenset(), frozenset())


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────


def shared(levels: dict[str, object], staying: dict[str, int], least: int | None, bare: int = 0) -> Plan:
    """The plan for `a` on an 80 GiB card beside the other models."""
    models = {name: ModelConfig(model="m", level=level) for name, level in levels.items()}
    config, known = Config(models=models), least and least * GIB
    plan = utilization("a", config, {0: 80 * GIB}, {}, {}, staying=staying, least=known, bare=bare * GIB)
    assert plan is not None
    return plan


def test_as_many_sleepers_keep_their_weights_as_leave_a_model_its_least() -> None:
    auto = dict.fromkeys("abcd", "auto")
    sizes = {"b": 8 * GIB, "c": 30 * GIB, "d": 2 * GIB}
    everybody, two, nobody = (shared(auto, sizes, least) for least in (20, 50, 72))
    assert (set(everybody.stay), two.stay, nobody.stay) == (set("bcd"), ("d", "b"), ())
    assert nobody.share == shared(auto, {}, 72).share
    assert 80 * GIB * (nobody.share - two.share) == pytest.approx(10 * GIB, abs=GIB)


def test_where_nobody_knows_what_a_model_needs_it_is_cut_for_none_but_level_0() -> None:
    levels = {"a": "auto", "b": "auto", "c": 0}
    sizes = {"b": 4 * GIB, "c": 30 * GIB}
    assert shared(levels, sizes, None).stay == ("c",)
    assert shared(levels, sizes, None, bare=42).stay == ("c",)
    assert shared(levels, sizes, None, bare=50).stay == ()  # it could not start
    assert shared(levels, sizes, 50).stay == ("b",)
    assert shared(levels, sizes, 42).stay == ("c",)  # the person wants it


@given(
    st.dictionaries(st.sampled_from("bcde"), st.integers(1, 60)),
    st.integers(1, 80),
    st.sampled_from(["auto", 0]),
)
def test_a_share_never_falls_below_the_least_for_company(
    sizes: dict[str, int], least: int, level: str | int
) -> None:
    levels = {"a": "auto", **dict.fromkeys("bcde", level)}
    staying = {name: size * GIB for name, size in sizes.items()}
    alone, together = shared(levels, {}, least), shared(levels, staying, least)
    assert together.share >= min(alone.share, least / 80 - 0.001)
    assert together.share <= alone.share
