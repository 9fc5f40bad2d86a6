"""What requests call models: each name means one model, or is refused with those that it could mean."""

from __future__ import annotations

import pytest

from vllm_sleep_tui.gateway.names import Names, Target
from vllm_sleep_tui.gateway.replies import Refusal

NAMES = Names({"org/big:8b": ["polite"], "small": ["org/big-8b", "polite", "terse"], "other": ["small"]})


def test_a_name_of_two_models_is_for_neither_but_under_the_path_of_one() -> None:
    with pytest.raises(Refusal, match=r"of org/big:8b and of small.* /org/big:8b/v1/") as refusal:
        NAMES.find("polite")
    assert refusal.value.status == 400
    small, _ = NAMES.split("/small/v1/chat/completions")
    assert NAMES.find("polite", path=small) == Target("small", "polite")


def test_names_that_differ_in_signs_alone_share_no_spelling() -> None:
    assert NAMES.find("org/big:8b").model == "org/big:8b"
    assert NAMES.find("org/big-8b").model == "small"
    with pytest.raises(Refusal):
        NAMES.find("org-big-8b")


def test_a_models_own_name_is_its_own_and_an_unknown_one_is_told_the_nearest() -> None:
    assert NAMES.find("small") == Target("small", "small")
    assert NAMES.find("terse") == Target("small", "terse")
    with pytest.raises(Refusal, match="Did you mean 'terse'"):
        NAMES.find("ters")
