"""What can go wrong, in words for people.

PanelError             one line on what is wrong, one on what to do; exit code 1
├── UsageError         the command or the config is wrong; exit code 2
├── RefusedError       the operation would do harm or cannot work, so nothing was done
├── OperationError     the operation was tried and failed
└── CancelledByUser    stopped at a safe point on request; exit code 130
"""

from __future__ import annotations

from collections.abc import Mapping

from vllm_sleep_tui.text import one_line


class PanelError(Exception):
    """An expected failure: ``what`` is wrong and ``cure`` says what to do; a line each, fit to be shown.

    Both may name what others wrote, a folder or a server's answer, so they are cleaned here, once for all who
    show them.
    """

    exit_code = 1

    def __init__(
        self, what: str, cure: str = "", *, by_model: Mapping[str, PanelError] | None = None
    ) -> None:
        self.what = one_line(what)
        self.cure = one_line(cure)
        self.by_model = dict(by_model or {})
        """Of an operation on several models: what went wrong with each; the others are done."""
        super().__init__(self.what)


class UsageError(PanelError):
    """The command line or the config file is wrong; nothing was done."""

    exit_code = 2


class RefusedError(PanelError):
    """The operation would do harm or cannot work from here; nothing was done."""


class OperationError(PanelError):
    """The operation was tried and did not succeed."""


class CancelledByUser(PanelError):  # noqa: N818 - it is not an error of anything
    """The person stopped the operation; it ended at its next safe point."""

    exit_code = 130
