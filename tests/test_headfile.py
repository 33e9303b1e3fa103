"""Tables per layer and head as files: what is written comes back, and nothing is lost or trusted."""

import os

import pytest

from sparseland.cache._moa_plan import PLAN
from sparseland.cache.moa import Rule
from sparseland.errors import SparselandError
from sparseland.files import MAX_JSON_BYTES, write_atomically

RULES = ((Rule(64, 0.25), Rule(0, 1.0)), (Rule(128, 0.0), Rule(-3, 0.5)))


def test_a_table_comes_back(tmp_path):
    path = PLAN.save(tmp_path / "plan.json", RULES)
    assert PLAN.load(path) == RULES
    assert PLAN.save(tmp_path / "again.json", [[r.as_dict() for r in row] for row in RULES])
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_malformed_table_leaves_the_old_file(tmp_path):
    path = PLAN.save(tmp_path / "plan.json", RULES)
    with pytest.raises(SparselandError, match="the table: layer 0, key head 0: a rule is"):
        PLAN.save(path, [[{"alpha": 1}]])
    with pytest.raises(SparselandError, match="layer 0, key head 0: a rule is"):
        PLAN.save(path, [[(1, 2)]])
    for nothing in (None, [], [None], [[]]):
        with pytest.raises(SparselandError, match='"rules" must be a non-empty list over layers'):
            PLAN.save(path, nothing)
    assert PLAN.load(path) == RULES


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = PLAN.save(tmp_path / "plan.json", RULES)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SparselandError, match=r"can't write the plan .*plan.json: No space left on device"):
        PLAN.save(path, RULES[:1])
    assert PLAN.load(path) == RULES
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_too_large_a_file_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(SparselandError, match="has over 64 MiB; a plan is small"):
        PLAN.load(path)
    if os.path.exists("/dev/zero"):  # has no size
        with pytest.raises(SparselandError, match="has over 64 MiB; a plan is small"):
            PLAN.load("/dev/zero")


def test_a_written_file_has_a_plain_file_s_permissions(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode
