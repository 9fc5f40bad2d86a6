"""What was measured is neither lost nor counted twice, whoever writes meanwhile."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from pathlib import Path

from vllm_sleep_tui.sizing.footprints import FootprintStore


def test_what_is_noted_while_an_earlier_note_is_written_is_kept(tmp_path: Path) -> None:
    store = FootprintStore(tmp_path)
    store.note("d", "v", lambda known: known.with_time("wake1", 1.0))
    with (tmp_path / "footprints.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # the flush has taken the first note and waits for this
        writing = threading.Thread(target=store.flush)
        writing.start()
        while store._changes:
            assert writing.is_alive()
            time.sleep(0.001)
        store.note("d", "v", lambda known: known.with_time("wake1", 2.0))
        fcntl.flock(other, fcntl.LOCK_UN)
        writing.join()

    assert FootprintStore(tmp_path).get("d", "v").times == {"wake1": (1.0,)}
    assert store.get("d", "v").times == {"wake1": (1.0, 2.0)}
    store.flush()
    assert FootprintStore(tmp_path).get("d", "v").times == {"wake1": (1.0, 2.0)}
    assert store.get("d", "v").times == {"wake1": (1.0, 2.0)}


def test_another_versions_figures_stand_in(tmp_path: Path) -> None:
    store = FootprintStore(tmp_path)
    store.note("d", "0.24.0", lambda known: known.with_weights(7))
    store.flush()
    assert store.get("d", "0.32.0").weights == 7
    assert store.get("other", "0.24.0").weights is None


def test_another_versions_figures_stand_in_one_by_one(tmp_path: Path) -> None:
    store = FootprintStore(tmp_path)
    store.note("d", "0.23.0", lambda known: known.with_weights(5).with_time("start", 90.0))
    store.note("d", "0.24.0", lambda known: known.with_weights(7).with_time("wake1", 1.0))
    store.note("d", "0.24.0", lambda known: known.with_memory(awake={"0": 9}, asleep={"0": 1}))
    store.flush()
    for _ in ("as noted", "as written"):
        store.note("d", "0.32.0", lambda known: known.with_time("wake1", 2.0))
        store.note("d", "0.32.0", lambda known: known.with_memory(awake={"0": 8}, asleep={}))
        now = store.get("d", "0.32.0")
        assert (now.weights, now.awake, now.asleep) == (7, {"0": 8}, {"0": 1})
        assert (now.typical("wake1"), now.typical("start")) == (2.0, 90.0)
        store.flush()
    assert store.get("d", "0.24.0").times["wake1"] == (1.0,)


def test_a_file_of_the_version_before_is_read_figures_that_are_no_more_left_out(tmp_path: Path) -> None:
    figures = {"awake": {"0": 9}, "weights": 7, "backed_up": 6, "times": {"wake1": [1.0]}}
    (tmp_path / "footprints.json").write_text(json.dumps({"d@0.24.0": figures}))
    read = FootprintStore(tmp_path).get("d", "0.24.0")
    assert (read.weights, read.awake, read.typical("wake1")) == (7, {"0": 9}, 1.0)


def test_a_file_of_measurements_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "footprints.json").mkdir()
    store = FootprintStore(tmp_path)
    store.note("d", "0.24.0", lambda known: known.with_weights(7))
    assert store.get("d", "0.24.0").weights == 7
    store.flush()
    assert store.get("d", "0.24.0").weights is None


def test_a_pipe_or_a_flood_in_the_place_of_the_measurements_is_none(tmp_path: Path) -> None:
    path = tmp_path / "footprints.json"
    os.mkfifo(path)
    assert FootprintStore(tmp_path).get("d", "v").times == {}
    path.unlink()
    with path.open("wb") as file:
        file.truncate(3 * 2**30)
    assert FootprintStore(tmp_path).get("d", "v").times == {}
