"""The storm uses the boxes of the fleet's tests."""

from __future__ import annotations

from tests.fleet.conftest import box

__all__ = ["box"]
