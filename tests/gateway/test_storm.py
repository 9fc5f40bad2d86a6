"""A short storm; `python -m tests.gateway.storm` is the long one."""

from __future__ import annotations

import asyncio
import time

from tests.gateway.conftest import MakeGated
from tests.gateway.storm import MODELS, Outcome, bound_where, storm


def test_every_request_is_answered_by_its_model_or_refused_while_things_are_killed(gated: MakeGated) -> None:
    here = gated(MODELS, gpus=["24GiB", "24GiB"], max_wait="10s")
    here.serve()
    began = time.monotonic()
    assert here.chat("m0").status_code == 200
    outcome = Outcome(bound=bound_where(time.monotonic() - began))
    asyncio.run(storm(here, outcome, requests=120, kills=3, seed=5))
    assert outcome.wrong == []
    assert max(outcome.took) <= outcome.bound
    assert sum(outcome.statuses.values()) == 120
    assert outcome.statuses[200] > 60
