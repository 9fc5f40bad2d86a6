"""How awake models serve, by their `/metrics`, while a panel or `serve` is open.

The leader keeps what they served in the history. A sleeper is not asked, but for one page when it has fallen
asleep: what it still answered while it was drained is counted there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.engine.failures import EngineError
from vllm_sleep_tui.engine.metrics import Page
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.poller import Poller
from vllm_sleep_tui.fleet.snapshot import Serving
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry import prometheus

INTERVAL = 2.0
"""Seconds between two looks at a model."""
ANSWER_LIMIT = 1.5
"""Seconds that one page may take; 0.01 to 0.1 s measured (vLLM 0.32)."""
WINDOW = 300.0
"""Seconds over which percentiles and hits are taken."""
OWED_PAGES = 3
"""Looks within which our own question must have been counted."""
MARK_EVERY = 10.0
"""Seconds between two pages that are kept for the window."""


class Work(NamedTuple):
    """What was asked and answered."""

    requests: int = 0
    """That ended, however they ended."""
    prompt_tokens: int = 0
    generated_tokens: int = 0


NOTHING = Work()
PROOF = Work(1, len(proof.PROMPT), 1)
"""What we ask at the end of a wake."""


def cached_tokens(page: Page, before: float) -> int | None:
    """The most tokens that the cache can hold, `before` of which had been computed before it was emptied."""
    size = page.cache_tokens
    if size is None:
        return None
    in_use = size * (page.kv_use or 0.0)
    if page.keeps_prefixes and page.computed_tokens is not None:
        in_use = max(in_use, min(size, page.computed_tokens - before))
    return round(in_use)


def work_between(last: Page, page: Page, ours: Work) -> tuple[Work, Work]:
    """What others asked from one page of a launch to the next, and what of `ours` is not counted there yet.

    vLLM counts an answer after it has been given, so that a page may come in between.
    """
    grown = [
        round(prometheus.increase(before or 0.0, now or 0.0))
        for before, now in (
            (last.requests, page.requests),
            (last.prompt_tokens, page.prompt_tokens),
            (last.generated_tokens, page.generated_tokens),
        )
    ]
    others = Work(*(max(0, more - own) for more, own in zip(grown, ours, strict=True)))
    return others, Work(*(max(0, own - more) for more, own in zip(grown, ours, strict=True)))


class Watch:
    """The pages of one launch."""

    def __init__(self) -> None:
        self._marks: deque[Page] = deque(maxlen=round(WINDOW / MARK_EVERY))
        self._last: Page | None = None
        self._since: float | None = None
        self._before = 0.0
        self._owed, self._owed_pages = NOTHING, 0
        self.work = NOTHING
        """Between the last two pages; what was before the first is not known."""

    def see(self, page: Page, since: float, ours: Work = NOTHING) -> Serving:
        """Take one more page of a model in its state since then (UTC seconds); what it comes to.

        `ours` is what we asked ourselves when it entered the state.
        """
        last, self._last = self._last, page
        entered = since != self._since
        if entered:
            self._owed, self._owed_pages = (ours if last else NOTHING), OWED_PAGES
        elif self._owed_pages == 0:
            self._owed = NOTHING  # it was never counted, and must not hide what others ask
        self._owed_pages = max(0, self._owed_pages - 1)
        self.work, self._owed = work_between(last, page, self._owed) if last else (NOTHING, NOTHING)
        if entered:
            # A sleep empties the cache and counts nothing, so the last page before it tells what is gone.
            self._before = (last.computed_tokens or 0.0) if last else 0.0
            self._since = since
        base = self._marks[0] if self._marks else page
        if not self._marks or page.time - self._marks[-1].time >= MARK_EVERY:
            self._marks.append(page)
        return _serving(last or page, base, page, self._before)


def _serving(last: Page, base: Page, page: Page, before: float) -> Serving:
    ttft = prometheus.buckets_since(base.ttft, page.ttft)
    inter_token = prometheus.buckets_since(base.inter_token, page.inter_token)
    seconds = page.time - last.time
    return Serving(
        running=None if page.running is None else round(page.running),
        waiting=None if page.waiting is None else round(page.waiting),
        kv_use=page.kv_use,
        prompt_tokens_per_s=prometheus.rate(last.prompt_tokens, page.prompt_tokens, seconds),
        generation_tokens_per_s=prometheus.rate(last.generated_tokens, page.generated_tokens, seconds),
        ttft_p50=prometheus.percentile(ttft, 0.5),
        ttft_p95=prometheus.percentile(ttft, 0.95),
        inter_token_p50=prometheus.percentile(inter_token, 0.5),
        inter_token_p95=prometheus.percentile(inter_token, 0.95),
        prefix_hit_share=_hit_share(base, page),
        cached_tokens=cached_tokens(page, before),
    )


def _hit_share(base: Page, page: Page) -> float | None:
    hits = prometheus.increase(base.prefix_hits or 0.0, page.prefix_hits or 0.0)
    queries = prometheus.increase(base.prefix_queries or 0.0, page.prefix_queries or 0.0)
    return hits / queries if queries else None


class ServingPoller(Poller):
    """Looks at every awake model; `figures` is what is known now, by model.

    While `keeps` says so, what was served goes into the history.
    """

    def __init__(
        self, core: Core, interval: float = INTERVAL, *, keeps: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__("the look at how models serve", interval, self.look)
        self._core = core
        self._keeps = keeps
        self._seen_awake: set[str] = set()
        self._watches: dict[str, tuple[str | None, Watch]] = {}
        self.figures: dict[str, Serving] = {}

    async def look(self) -> None:
        """One look at every model that is awake, and at those that fell asleep since the last one."""
        models = [model for model in self._core.models() if self._is_readable(model)]
        awake = [model for model in models if model.record.state is State.AWAKE and model.record.launch]
        fallen = [
            model for model in models if model.record.state is State.ASLEEP and model.name in self._seen_awake
        ]
        on_their_way = {model.name for model in models if model.record.state is State.FALLING_ASLEEP}
        names = {model.name for model in awake}
        self._seen_awake = names | (self._seen_awake & on_their_way)
        self.figures = {name: figures for name, figures in self.figures.items() if name in names}
        await asyncio.gather(*(self._look_at(model) for model in (*awake, *fallen)))

    def _is_readable(self, model: Model) -> bool:
        """Reads the model's record; False while it cannot be read."""
        with self._faults.catch(f"the look at how {model.name} serves"):
            model.read()
            return True
        return False

    async def _look_at(self, model: Model) -> None:
        """One model's page; what cannot be made sense of costs that page."""
        with self._faults.catch(f"the look at how {model.name} serves"):
            await self._read_page(model)

    async def _read_page(self, model: Model) -> None:
        name, record = model.name, model.record
        try:
            text = await model.client().metrics(timeout=ANSWER_LIMIT)
        except EngineError:
            self.figures.pop(name, None)
            return
        page = Page.read(text, time.monotonic())
        launch, watch = self._watches.get(name, (None, Watch()))
        if launch != record.launch:
            watch = Watch()
            self._watches[name] = (record.launch, watch)
        if record.state is State.AWAKE:
            self.figures[name] = watch.see(page, record.since, PROOF if record.reference else NOTHING)
            self._keep(name, watch.work, time.time())
        else:
            watch.see(page, record.since)
            self._keep(name, watch.work, record.since)

    def _keep(self, name: str, work: Work, at: float) -> None:
        if work != NOTHING and self._keeps():
            self._core.note(lambda past: past.record_served(name, *work, at=at))
