"""Measurements on disk: what is written stays, what can't be written is one clear line."""

import json
from pathlib import Path

import pytest

from sparseland.errors import SparselandError
from sparseland.rowfile import RowFile


class Log(RowFile):
    KIND = "job"
    OTHER = "another job"


def test_a_rerun_continues_behind_the_last_whole_row(tmp_path):
    with Log(tmp_path, "a") as log:
        log.add({"kind": "job", "fingerprint": "a"})
        log.add({"kind": "x", "n": 1})
    with log.path.open("a") as file:
        file.write('{"kind": "x", "n"')  # an interrupt
    with Log(tmp_path, "a") as log:
        assert [r["n"] for r in log.of("x")] == [1]
        log.add({"kind": "x", "n": 2})
    assert [json.loads(line).get("n") for line in log.path.read_text().splitlines()] == [None, 1, 2]
    with pytest.raises(SparselandError, match="holds another job; choose another --out"):
        Log(tmp_path, "b")


def test_somebody_elses_file_is_kept_and_a_cut_first_row_is_not(tmp_path):
    path = tmp_path / "results.jsonl"
    for foreign in ("my results: 3, 4\n", '{"epoch": 1, "loss": 2.0}\n'):
        path.write_text(foreign)
        with pytest.raises(SparselandError, match=r"results\.jsonl holds something else than results"):
            Log(tmp_path, "a")
        assert path.read_text() == foreign
    for cut in ("", '{"ki', '{"kind": "job", "finger'):
        path.write_text(cut)
        with Log(tmp_path, "a") as log:
            assert log.rows == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_clear_line(tmp_path):
    with Log(tmp_path, "a") as log:
        log.add({"kind": "job", "fingerprint": "a"})
        log._file.close()
        with Path("/dev/full").open("a") as log._file:
            with pytest.raises(SparselandError, match=r"can't write to .*results\.jsonl: No space left"):
                log.add({"kind": "x", "n": 1})
            log.close()
    with Log(tmp_path, "a") as log:
        assert len(log.rows) == 1
