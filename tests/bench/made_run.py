"""A run made of round figures near those of h100/bench.jsonl: its report can be checked by eye."""

from __future__ import annotations

from vllm_sleep_tui.bench.plan import Mode, PassKey, Plan, order
from vllm_sleep_tui.bench.results import Found, Gpu, Load, Machine, Memory, Pass, Run, Step
from vllm_sleep_tui.fleet.states import State

GIB = 2**30
SWITCH = {
    Mode.LEVEL1: {"qwen": 0.55, "phi": 0.53},
    Mode.LEVEL2: {"qwen": 0.70, "phi": 1.45},
    Mode.COLD: {"qwen": 48.0, "phi": 52.0},
}
PHASES = {
    Mode.LEVEL1: {"sleep": 0.3, "wake": 0.6, "prove": 0.1},
    Mode.LEVEL2: {"sleep": 0.1, "wake": 0.8, "weights": 0.1, "reload": 0.6, "kv_cache": 0.1, "prove": 0.1},
    Mode.COLD: {"stop": 0.05, "loading": 0.75, "compiling": 0.2},
}
INFERENCE = {"qwen": 0.25, "phi": 0.39}


def memory(awake: str, mode: Mode) -> Memory:
    """What the pair holds with one of them awake."""
    other = "phi" if awake == "qwen" else "qwen"
    held = {awake: 69 * GIB, other: 0 if mode is Mode.COLD else 3 * GIB // 2}
    return Memory(
        vram=dict(held),
        ram={"qwen": 5 * GIB, "phi": 12 * GIB},
        gpu_used={"0": sum(held.values())},
        ram_available=100 * GIB,
    )


def made_pass(key: PassKey, slower: float = 1.0) -> Pass:
    """One pass; each repeat is a little slower, and `slower` multiplies all switches."""
    steps: list[Step] = []
    leaving = None
    for number, target in enumerate(("qwen", "phi") * 3):
        switch = SWITCH[key.mode][target] * slower * (1 + (key.repeat - 1) / 50 + number / 200)
        steps.append(
            Step(
                number=number,
                leaving=leaving,
                target=target,
                began=1_800_000_000.0 + number,
                switch=switch,
                phases={name: share * switch for name, share in PHASES[key.mode].items()},
                question=f"Question {number}?",
                ttft=0.02 if key.mode is not Mode.COLD else 0.1,
                inference=INFERENCE[target] * (1 if key.mode is not Mode.COLD else 1.3),
                tokens=100,
                before=memory(leaving or target, key.mode),
                after=memory(target, key.mode),
            )
        )
        leaving = target
    return Pass(key=key, began=1_800_000_000.0, steps=tuple(steps))


def made_run(counts: dict[Mode, int], *, slower: float = 1.0) -> Run:
    """A whole run of these modes and repeats."""
    keys = order(counts, seed=0)
    phases = {"loading": 40.0, "capturing": 8.0, "warming": 1.0, "priming": 3.0, "first answer": 0.5}
    return Run(
        program="0.1.0",
        began=1_800_000_000.0,
        plan=Plan(a="qwen", b="phi", passes=keys),
        machine=Machine(
            cpu="Test CPU",
            cores=16,
            ram_bytes=125 * GIB,
            kernel="6.1",
            gpus=(Gpu(index=0, name="NVIDIA H100", total_bytes=80 * GIB, simulated=False),),
            driver="580.65",
            vllm="0.24.0",
            torch="2.11.0",
            vllm_python="3.12",
            python="3.11",
        ),
        models={
            "qwen": {"model": "Qwen/Qwen3-0.6B", "args": {"max-model-len": 4096}},
            "phi": {"model": "microsoft/Phi-3-mini-4k-instruct", "level": 1},
        },
        found=tuple(Found(name=name, state=State.STOPPED) for name in ("qwen", "phi")),
        restored=True,
        loads=tuple(
            Load(model=name, began=1_800_000_000.0, seconds=sum(phases.values()), phases=phases)
            for name in ("qwen", "phi")
        ),
        passes=tuple(made_pass(key, slower) for key in keys),
    )
