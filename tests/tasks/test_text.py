"""Texts: what is read, in which order, and what is refused with which words."""

from pathlib import Path

import pytest
import torch
from letters import Letters

from sparseland.errors import SparselandError
from sparseland.tasks import text as module
from sparseland.tasks.text import default_text, load_text, tokenize, windows


def test_the_default_text_is_the_python_documentation():
    from pydoc_data.topics import topics

    text = default_text()
    assert text == default_text()
    assert len(text) > 400_000
    first, last = min(topics), max(topics)
    assert text.startswith(topics[first])
    assert text.endswith(topics[last])
    assert all(topics[name] in text for name in ("assert", "for", "with"))


def test_a_file_is_read_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\r\n")
    assert load_text(path) == "Grüße\r\n"
    assert load_text(str(path)) == load_text(path)


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path):
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.txt").write_text("third")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.txt").write_text("hidden")
    (tmp_path / ".f").write_bytes(b"\xff")
    assert load_text(tmp_path) == "first\n\nsecond\n\nthird"


def test_a_hidden_folder_that_is_asked_for_is_read(tmp_path):
    folder = tmp_path / ".notes"
    folder.mkdir()
    (folder / "a.txt").write_text("asked for")
    assert load_text(folder) == "asked for"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\t\r\n", "is empty"),
        (b"a\0b", "is binary"),
        (b"abc\xffdef", r"is not UTF-8 \(byte 3\)"),
        ("Grüße".encode("utf-16"), r"is not UTF-8 \(byte 0\)"),
        ("naïve".encode("latin-1"), r"is not UTF-8 \(byte 2\)"),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_what_is_no_text_is_refused_by_name(tmp_path, content, words, as_folder):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(SparselandError, match=words) as error:
        load_text(tmp_path if as_folder else path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_bad_file_spoils_a_folder_and_is_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(SparselandError, match=r"image\.png is not UTF-8 \(byte 0\)"):
        load_text(tmp_path)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(SparselandError, match="/dev/null: neither a file nor a folder"):
        load_text("/dev/null")
    with pytest.raises(SparselandError, match="nowhere: no such file or folder"):
        load_text(tmp_path / "nowhere")
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(SparselandError, match="the folder holds no files"):
        load_text(tmp_path)


def test_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"x" * 2**19)
    monkeypatch.setattr(module, "MAX_BYTES", 2**20)
    assert len(load_text(tmp_path)) == 2**20 + 2
    (tmp_path / "c").write_bytes(b"x" * 2**20)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read"))
    with pytest.raises(SparselandError, match="has 2 MiB; at most 1 are read"):
        load_text(tmp_path)


def test_a_file_that_can_not_be_read_says_why(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(SparselandError, match=r"a: Permission denied$"):
        load_text(tmp_path / "a")


def test_tokens_come_without_special_ones(smollm):
    ids = tokenize(Letters(), "ab")
    assert ids.dtype == torch.long
    assert ids.tolist() == [97, 98]
    assert smollm.decode(tokenize(smollm, "Some words 42.")) == "Some words 42."


@pytest.mark.parametrize(
    ("length", "count", "starts"),
    [(4, 3, [0, 3, 6]), (4, 1, [0]), (9, 2, [0, 1]), (10, 3, [0, 0, 0]), (3, 4, [0, 2, 4, 7])],
)
def test_windows_are_evenly_spread(length, count, starts):
    found = windows(torch.arange(10), length, count)
    assert found.tolist() == [list(range(s, s + length)) for s in starts]


def test_a_text_shorter_than_a_window_is_refused_with_both_counts():
    with pytest.raises(SparselandError, match=r"the text has 10 tokens; 11 are needed"):
        windows(torch.arange(10), 11, 1)
