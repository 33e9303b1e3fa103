"""A sample results file and its page, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample import write_sample

from sparseland.report import write_report
from sparseland.report.results import Results, read_results


@pytest.fixture(scope="session")
def sample_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``results.jsonl`` of a finished run at 2,048 and 4,096 tokens."""
    return write_sample(tmp_path_factory.mktemp("sample") / "results.jsonl")


@pytest.fixture(scope="session")
def sample(sample_file: Path) -> Results:
    """The same, read."""
    return read_results(sample_file)


@pytest.fixture(scope="session")
def page_file(sample_file: Path) -> Path:
    """``report.html`` of the sample."""
    out = sample_file.with_name("report.html")
    write_report(sample_file, out)
    return out


@pytest.fixture(scope="session")
def page(page_file: Path) -> str:
    """The text of the page."""
    return page_file.read_text(encoding="utf-8")
