"""The decision guide, on figures as they come from an H100 and on generated ones."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from vllm_sleep_tui.sizing.advice import Advice, ModelAdvice, Verdict, advise, changes
from vllm_sleep_tui.sizing.budget import MARGIN
from vllm_sleep_tui.sizing.estimate import ACTIVATIONS
from vllm_sleep_tui.sizing.figures import Figures, Machine
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD
from vllm_sleep_tui.sizing.sharing import asleep_on, largest_set, share_out
from vllm_sleep_tui.units import GIB


def gib(size: float) -> int:
    return int(size * GIB)


def figures(name: str, awake: float, **fields: object) -> Figures:
    """A model of GPU 0 that was measured."""
    measured = Figures(
        name=name,
        gpus=(0,),
        configured="auto",
        awake={0: gib(awake)},
        asleep={0: gib(1.5)},
        weights=gib(7.3),
        pinned=gib(10.1),
        start=52.0,
        wake1=0.45,
        wake2=1.38,
    )
    return replace(measured, **fields)  # type: ignore[arg-type]


QWEN = figures("qwen", 69.2, weights=gib(1.1), pinned=gib(3.0), wake1=0.36, wake2=0.6, start=47.0)
PHI = figures("phi", 68.1)
H100 = Machine(totals={0: gib(79.6)}, others={}, ram=gib(100))


def of(advice: Advice, name: str) -> ModelAdvice:
    return next(model for model in advice.models if model.name == name)


def test_with_ram_for_all_everybody_sleeps_at_level_1_and_the_figures_say_why() -> None:
    advice = advise(H100, [QWEN, PHI])
    assert [(model.verdict, model.level) for model in advice.models] == [(Verdict.LEVEL_1, "1")] * 2
    why = of(advice, "phi").why
    assert "10.1 GiB of RAM" in why
    assert "a wake by itself takes 0.45 s against 1.38 s at level 2 and 52 s for a start" in why
    assert "estimate" not in why


def test_when_ram_is_short_it_goes_to_whom_it_helps_most_for_its_size() -> None:
    small = replace(H100, ram=gib(4))
    advice = advise(small, [PHI, replace(QWEN, wake2=1.5)])
    assert of(advice, "qwen").verdict is Verdict.LEVEL_1
    phi = of(advice, "phi")
    assert (phi.verdict, phi.level) == (Verdict.LEVEL_2, "2")
    assert "10.1 GiB of RAM and 1.0 GiB are left for it" in phi.why


def test_ram_that_is_not_known_forbids_nothing() -> None:
    assert of(advise(replace(H100, ram=None), [QWEN, PHI]), "phi").verdict is Verdict.LEVEL_1


def test_a_model_that_level_2_would_harm_gets_ram_first_and_is_stopped_without_it() -> None:
    lora = replace(PHI, no_level2="vLLM does not reload LoRA adapters")
    roomy = advise(replace(H100, ram=gib(11)), [QWEN, lora])
    assert of(roomy, "phi").verdict is Verdict.LEVEL_1
    assert of(roomy, "qwen").verdict is Verdict.LEVEL_2
    short = of(advise(replace(H100, ram=gib(5)), [QWEN, lora]), "phi")
    assert (short.verdict, short.level) == (Verdict.NONE, "none")
    assert "LoRA" in short.why


def test_models_that_fit_together_are_kept_awake() -> None:
    advice = advise(H100, [replace(QWEN, awake={0: gib(30)}), replace(PHI, awake={0: gib(40)})])
    assert [model.verdict for model in advice.models] == [Verdict.TOGETHER] * 2
    assert of(advice, "qwen").beside == ("phi",)
    assert advice.gpus[0].sentence == "qwen and phi fit awake together: 70.0 GiB of 79.1 GiB."
    assert advice.gpus[0].sharing is None


def test_smaller_caches_are_advised_where_each_keeps_four_contexts() -> None:
    pair = [replace(QWEN, context=gib(0.9)), replace(PHI, context=gib(1.5))]
    advice = advise(H100, pair)
    assert [model.verdict for model in advice.models] == [Verdict.TOGETHER] * 2
    shares = [model.utilization or 0 for model in advice.models]
    assert sum(shares) * 79.6 + 2 * AWAKE_OVERHEAD / GIB <= 79.1
    assert "full contexts" in of(advice, "phi").why
    tight = advise(H100, [replace(figures, context=gib(9)) for figures in pair])
    assert [model.verdict for model in tight.models] == [Verdict.LEVEL_1] * 2
    sharing = tight.gpus[0].sharing
    assert sharing is not None
    assert sharing.models == ("qwen", "phi")


def test_a_model_alone_on_its_gpu_does_not_sleep() -> None:
    advice = advise(H100, [QWEN])
    assert of(advice, "qwen").verdict is Verdict.ALONE
    assert of(advice, "qwen").level == "none"


def test_a_model_that_sleepers_crowd_out_takes_less_or_runs_alone() -> None:
    sleepers = [figures(f"s{index}", 60.0, asleep={0: gib(2)}) for index in range(5)]
    greedy = of(advise(H100, [replace(PHI, awake={0: gib(72)}, context=gib(1)), *sleepers]), "phi")
    assert greedy.verdict is Verdict.LEVEL_1
    assert greedy.utilization is not None
    assert greedy.utilization * 79.6 + AWAKE_OVERHEAD / GIB <= 69.1
    huge = of(advise(H100, [replace(PHI, awake={0: gib(72)}, weights=gib(68)), *sleepers]), "phi")
    assert huge.verdict is Verdict.ALONE
    assert "needs 72.0 GiB on GPU 0, and 69.1 GiB are left" in huge.why


def test_a_model_too_large_for_its_gpu_is_told_what_it_needs() -> None:
    large = replace(PHI, weights=gib(90), context=gib(2), estimated=frozenset({"memory"}))
    found = of(advise(H100, [large, QWEN]), "phi")
    assert (found.verdict, found.level) == (Verdict.TOO_LARGE, None)
    assert "95.2 GiB" in found.why


def test_a_model_that_is_hardly_used_is_stopped_instead() -> None:
    rare = of(advise(H100, [replace(QWEN, per_day=2 / 7), PHI]), "qwen")
    assert rare.verdict is Verdict.NONE
    assert "2.0 times a week" in rare.why
    assert of(advise(H100, [replace(QWEN, per_day=3.0), PHI]), "qwen").verdict is Verdict.LEVEL_1


def test_what_cannot_be_judged_is_left_as_it_is() -> None:
    strangers = replace(PHI, name="url", is_attached=True)
    unknown = replace(PHI, name="new", weights=None, pinned=None)
    on_cpu = replace(PHI, name="cpu", gpus=(), awake={}, asleep={})
    advice = advise(H100, [QWEN, strangers, unknown, on_cpu])
    assert of(advice, "url").verdict is Verdict.ATTACHED
    assert of(advice, "new").verdict is Verdict.UNKNOWN
    assert of(advice, "cpu").verdict is Verdict.NONE
    assert {of(advice, "url").level, of(advice, "new").level} == {None}


def test_estimates_are_called_estimates() -> None:
    guessed = replace(PHI, estimated=frozenset({"memory", "pinned", "wake1"}))
    found = of(advise(H100, [QWEN, guessed]), "phi")
    assert found.is_estimate
    assert "10.1 GiB (estimate) of RAM" in found.why
    assert "0.45 s (estimate) against 1.38 s at" in found.why


def test_only_what_differs_is_a_change() -> None:
    advice = advise(H100, [QWEN, PHI])
    assert changes(advice, {"qwen": "1", "phi": "auto"}) == {"phi": ("1", None)}


sizes = st.integers(min_value=0, max_value=90)
models = st.lists(st.tuples(sizes, st.integers(0, 3), st.integers(1, 40), st.integers(1, 30)), max_size=6)


def test_level_0_is_told_with_what_it_keeps_what_it_leaves_and_how_fast_it_is() -> None:
    qwen = replace(QWEN, resident=gib(1.1), stay=("phi",), kv_cache=gib(50), kv_per_token=112 * 1024)
    phi = replace(PHI, resident=gib(7.3), stay=("qwen",), kv_cache=gib(45), wake0=0.027)
    advice = advise(H100, [qwen, phi])
    told = of(advice, "qwen").level_0
    assert told is not None
    assert (told.beside, told.resident) == (("phi",), gib(1.1))
    assert (told.stay, told.kv_tokens) == (("phi",), gib(50) // (112 * 1024))
    assert "beside phi: 1.1 GiB, and it wakes in 30 ms (estimate)." in told.sentence
    assert "KV cache of 50.0 GiB, 468,114 tokens, beside the weights of phi" in told.sentence
    measured = of(advice, "phi").level_0
    assert measured is not None
    assert "wakes in 27 ms." in measured.sentence
    assert [model.level for model in advice.models] == ["auto", "auto"]  # 1 would forbid it
    assert of(advise(H100, [QWEN, PHI]), "qwen").level_0 is None


def test_weights_that_nobody_has_room_for_are_told() -> None:
    told = of(advise(H100, [replace(QWEN, stay=("phi",)), replace(PHI, resident=gib(7.3))]), "phi").level_0
    assert told is not None
    assert told.beside == ("qwen",)
    alone = of(advise(H100, [QWEN, replace(PHI, resident=gib(7.3), kv_note="no")]), "phi").level_0
    assert alone is not None
    assert "7.3 GiB of VRAM, which nobody awake on its GPUs has to spare. But no." in alone.sentence


def generated(found: list[tuple[int, int, int, int]]) -> list[Figures]:
    return [
        figures(
            f"m{index}",
            max(awake, asleep),
            asleep={0: gib(asleep)},
            weights=gib(weights),
            pinned=gib(pinned),
            context=gib(1),
        )
        for index, (awake, asleep, weights, pinned) in enumerate(found)
    ]


@given(models, st.integers(0, 100))
def test_level_1_never_takes_more_ram_than_there_is(found: list[tuple[int, int, int, int]], ram: int) -> None:
    there = generated(found)
    advice = advise(replace(H100, ram=gib(ram)), there)
    pinned = {each.name: each.pinned or 0 for each in there}
    first = [model for model in advice.models if model.verdict is Verdict.LEVEL_1]
    assert sum(pinned[model.name] for model in first) <= gib(ram)
    assert [model.name for model in advice.models] == list(pinned)


@given(models)
def test_no_larger_set_fits_than_the_one_that_is_named(found: list[tuple[int, int, int, int]]) -> None:
    there = generated(found)

    def fits(names: set[str]) -> bool:
        held = (each.awake[0] if each.name in names else each.asleep[0] for each in there)
        return sum(held) + MARGIN <= H100.totals[0]

    named = set(largest_set(H100, there, 0))
    assert fits(named) or not named
    for larger in combinations([each.name for each in there], len(named) + 1):
        assert not fits(set(larger))


@given(models.filter(lambda found: len(found) > 1))
def test_a_cache_that_is_advised_fits_and_passes_vllms_check(
    found: list[tuple[int, int, int, int]],
) -> None:
    there = generated(found)
    sharing = share_out(H100, asleep_on(H100, there), there[:2])
    if sharing is None:
        return
    total = H100.totals[0]
    held = sum(sharing.utilization[each.name] * total + AWAKE_OVERHEAD for each in there[:2])
    asleep = sum(each.asleep[0] for each in there[2:])
    assert held + asleep + MARGIN <= total
    for each in there[:2]:
        room = sharing.utilization[each.name] * total - (each.weights or 0) - ACTIVATIONS
        assert room <= sharing.kv_cache_memory_bytes[each.name] + 1
