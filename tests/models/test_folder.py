"""Reading quietly: transformers' own settings come back, also after an error."""

import warnings

import pytest
import torch
from transformers.utils import logging

from sparseland.errors import SparselandError
from sparseland.models.folder import DTYPES, as_dtype, quiet


def test_dtypes_have_three_names():
    assert {name: as_dtype(name) for name in DTYPES} == {
        "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    }  # fmt: skip
    for name in ("float64", "torch.float32", ""):
        with pytest.raises(SparselandError, match=f"dtype='{name}' is not allowed"):
            as_dtype(name)


@pytest.fixture
def loud():
    """Settings of a user who wants to hear everything; the test's own come back."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_debug()
    logging.enable_progress_bar()
    yield
    logging.set_verbosity(level)
    if not bars:
        logging.disable_progress_bar()


def test_quiet_inside_and_as_before_after_an_error(loud):
    def fail():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), quiet():
        fail()
    assert logging.get_verbosity() == logging.DEBUG
    assert logging.is_progress_bar_enabled()


def test_bars_that_were_off_stay_off(loud):
    logging.disable_progress_bar()
    with quiet():
        pass
    assert not logging.is_progress_bar_enabled()


def test_warnings_are_silent_inside_and_heard_after():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("inside", stacklevel=1)
        warnings.warn("outside", stacklevel=1)
    assert [str(w.message) for w in heard] == ["outside"]
