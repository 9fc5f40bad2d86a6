"""Whether a server that woke is itself: its first token is what it was when it was known to be well.

Wrong answers are cured once, by loading the weights again; a server that stays wrong is failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from vllm_sleep_tui.engine import proof, sleeping
from vllm_sleep_tui.engine.failures import EngineError, EngineRefused
from vllm_sleep_tui.engine.proof import Verdict
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.end import fail_as
from vllm_sleep_tui.fleet.operations.failures import Failure, wake_failure
from vllm_sleep_tui.fleet.operations.operation import Operation


class Proof:
    """The proof of one running server; the caller holds the model's lock and its GPUs' locks."""

    def __init__(self, model: Model, operation: Operation) -> None:
        self._model = model
        self._operation = operation
        self._call = model.core.limits.call

    async def take_reference(self, seconds: float | None = None) -> None:
        """Ask the proof's question, with nothing cached, of a model that is known to be well.

        It has `seconds` for the answer, or as long as any call.
        """
        client = self._model.client()
        with contextlib.suppress(EngineRefused):
            await client.reset_prefix_cache(self._call)
        reference = await proof.ask(client, self._model.name, seconds or self._call)
        self._model.write(reference=reference)

    @contextlib.asynccontextmanager
    async def asked_along(self, level: int) -> AsyncIterator[asyncio.Future[bool | None] | None]:
        """The proof's question, asked while it wakes; vLLM keeps it until everything is awake.

        None where a wake takes more than one call, and without our sleep mode.
        """
        record = self._model.record
        if level == 2 or record.sleep_backend != "own" or record.reference is None:
            yield None
            return
        asked = asyncio.ensure_future(self._is_itself_soon())
        try:
            yield asked
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    async def prove(self, asked: asyncio.Future[bool | None] | None = None) -> str:
        """The first token after a wake, compared with the reference; twice wrong is reloaded, then failed.

        An answer to what was `asked` while it woke counts; if it is right, then it is awake as well.
        """
        reference = self._model.record.reference
        self._operation.tell(self._model.name, "prove")
        with self._operation.timed("prove"):
            try:
                if reference is None:
                    if not await self._model.client().health(self._call):
                        await fail_as(self._model, Failure.PROOF_REFUSED, "its health is bad.")
                    return Verdict.UNPROVEN
                limit = self._call
                is_well = None
                if asked is not None:
                    begun = time.monotonic()
                    await asyncio.wait({asked}, timeout=limit)
                    is_well = asked.result() if asked.done() else None
                    # Who hangs is not given all of the time once more: others wait for this GPU.
                    limit = max(limit - (time.monotonic() - begun), limit / 4)
                    if not is_well:
                        await self._check_awake()
                answers = is_well or await self._is_itself(limit)
                if answers or (is_well is None and await self._is_itself(limit)):
                    return proof.proven(self._replicas, reference)
            except EngineError as error:
                await fail_as(self._model, Failure.PROOF_REFUSED, error)
            return await self._reload_and_prove()

    async def _is_itself_soon(self) -> bool | None:
        """Whether it is itself, asked while it wakes; None, and never an EngineError, if it does not say."""
        await asyncio.sleep(sleeping.ALONG_SECONDS)
        with contextlib.suppress(EngineError):
            return await self._is_itself(self._model.moving_seconds + self._call)
        return None

    async def _check_awake(self) -> None:
        """Fail it if the wake has left it asleep: then it would keep the proof's question for ever."""
        try:
            await sleeping.check_awake(self._model.client(), self._model.moving_seconds)
        except EngineRefused as error:
            await fail_as(self._model, wake_failure(self._model.record, error), error)
        except EngineError as error:
            await fail_as(self._model, Failure.SILENT, error)

    async def _reload_and_prove(self) -> str:
        """The cure of wrong answers, tried once; raises OperationError if they stay wrong."""
        client, reference = self._model.client(), self._model.record.reference
        self._operation.tell(self._model.name, "prove", "wrong answers: its weights are loaded again")
        try:
            await sleeping.reload(client, self._model.moving_seconds, quick=self._call)
            if await self._is_itself(self._call) and reference is not None:
                return proof.proven(self._replicas, reference)
        except EngineError as error:
            why = f"Its weights could not be loaded again: {error}"
            await fail_as(self._model, Failure.ANSWER_WRONG, why)
        return await fail_as(self._model, Failure.ANSWER_WRONG)

    async def _is_itself(self, seconds: float) -> bool:
        """Whether it answers, within `seconds`, as when it was known to be well."""
        client, reference = self._model.client(), self._model.record.reference
        assert reference is not None
        return await proof.is_itself(client, self._model.name, reference, seconds, self._replicas)

    @property
    def _replicas(self) -> int:
        """How many data parallel replicas are to be proven."""
        return ServeArgs(self._model.config.args).replicas
