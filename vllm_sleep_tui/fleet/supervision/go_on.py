"""Loops that look again and again must outlive what nobody foresaw."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

log = logging.getLogger(__name__)


class GoOn:
    """Around one look of a loop; each thing that went wrong in it is said once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    @contextlib.contextmanager
    def after(self, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is logged, and that is all."""
        try:
            yield
        except Exception as error:
            said = f"{what}: {error!r}"
            if said not in self._said:
                self._said.add(said)
                log.exception("%s went wrong", what)
