"""Specs, parameters and the registry."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import sparseland
from sparseland.errors import SparselandError
from sparseland.method import (
    Calibration,
    Card,
    Method,
    as_methods,
    describe_params,
    find_by_class_name,
    method_class,
    method_slugs,
    param,
    parse_spec,
    split_specs,
)


@dataclasses.dataclass(frozen=True)
class Sample(Method):
    card: ClassVar[Card] = Card("sample", "A Title", "nowhere", "attention", "none", "for these tests")
    budget: float = param(0.25, "share of something", gt=0, le=1)
    size: int = param(64, "tokens", ge=1)
    kind: str = param("a", "which", choices=("a", "b"))
    fast: bool = param(False, "hurry")
    limit: int | None = param(None, "at most", ge=0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"budget": "1/16"}, {"budget": 0.0625}),
        ({"budget": "0.5", "size": "128"}, {"budget": 0.5, "size": 128}),
        ({"fast": "true", "kind": "b"}, {"fast": True, "kind": "b"}),
        ({"limit": "7"}, {"limit": 7}),
        ({"limit": "none"}, {"limit": None}),
    ],
)
def test_text_becomes_typed_values(given, expected):
    method = Sample(**given)
    assert {k: getattr(method, k) for k in expected} == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"budget": "0"}, ["sample", "budget=0", "> 0 and <= 1"]),
        ({"budget": "2"}, ["budget=2", "<= 1"]),
        ({"budget": "nan"}, ["budget=nan"]),
        ({"budget": "1/0"}, ["budget=1/0"]),
        ({"size": "1.5"}, ["size=1.5", "whole number >= 1"]),
        ({"size": True}, ["size=True"]),
        ({"kind": "c"}, ["kind=c", "one of a, b"]),
        ({"fast": "maybe"}, ["fast=maybe", "true or false"]),
        ({"limit": "-1"}, ["limit=-1", ">= 0"]),
        ({"size": None}, ["size=None"]),
    ],
)
def test_a_bad_value_says_what_is_allowed(given, words):
    with pytest.raises(SparselandError) as caught:
        Sample(**given)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_spec_shows_only_what_differs_from_the_defaults():
    assert Sample().spec == "sample"
    assert Sample(budget=1 / 16, fast=True).spec == "sample:budget=0.0625,fast=true"
    assert Sample(limit=3).spec == "sample:limit=3"


def test_params_are_described():
    rows = {row["name"]: row for row in describe_params(Sample)}
    assert rows["budget"]["allowed"] == "a number > 0 and <= 1"
    assert rows["limit"]["allowed"] == "a whole number >= 0"
    assert rows["kind"]["help"] == "which"


@pytest.mark.parametrize("slug", method_slugs())
def test_every_method_file_is_found_under_its_own_slug(slug):
    cls = method_class(slug)
    assert cls.card.slug == slug
    assert cls.card.summary
    assert "\n" not in cls.card.summary
    assert find_by_class_name(cls.__name__) is cls
    assert getattr(sparseland, cls.__name__) is cls
    assert cls().roles


@pytest.mark.parametrize("slug", method_slugs())
def test_specs_round_trip_for_defaults_and_grids(slug):
    cls = method_class(slug)
    for method in [cls(), *cls.grid(4096)]:
        assert parse_spec(method.spec) == method
        assert cls(**method.params()) == method
    if slug == "dense":
        return
    if cls.card.control:
        assert cls.at_density(0.2, 4096).spec != cls.at_density(0.4, 4096).spec
    else:
        assert len(set(cls.grid(4096))) == len(cls.grid(4096)) >= 1


def test_unknown_names_are_one_clear_line():
    with pytest.raises(SparselandError, match=r"unknown method 'flexprefil'.*flexprefill"):
        parse_spec("flexprefil")
    with pytest.raises(SparselandError, match=r"no parameter 'gama'; it has gamma"):
        parse_spec("flexprefill:gama=0.9")
    with pytest.raises(SparselandError, match="key=value"):
        parse_spec("flexprefill:gamma")
    with pytest.raises(SparselandError, match="twice"):
        parse_spec("flexprefill:gamma=0.9,gamma=0.8")
    with pytest.raises(AttributeError):
        _ = sparseland.NoSuchMethod


def test_a_comma_separates_specs_only_where_no_parameter_follows():
    assert split_specs("a,b:x=1,y=2,c") == ["a", "b:x=1,y=2", "c"]
    assert split_specs("a:x=1,b:y=2") == ["a:x=1", "b:y=2"]
    assert split_specs(" a , b") == ["a", "b"]
    assert split_specs("") == []


@pytest.mark.parametrize("text", [",", "a,", ",a", "a,,b", "a:x=1, ,b", " "])
def test_an_empty_name_between_commas_is_refused(text):
    with pytest.raises(SparselandError, match="a name is empty; write specs such as"):
        split_specs(text)


@pytest.mark.parametrize("spec", ["flexprefill:", "flexprefill: ", "flexprefill:gamma=0.9,", "flexprefill:,"])
def test_an_empty_parameter_is_refused(spec):
    with pytest.raises(SparselandError, match="a parameter is empty; write flexprefill or flexprefill:key"):
        parse_spec(spec)


def test_methods_come_as_specs_in_a_line_as_one_method_or_in_any_list():
    expected = [parse_spec("flexprefill:gamma=0.9,min_budget=512"), parse_spec("mustafar")]
    assert as_methods("flexprefill:gamma=0.9,min_budget=512,mustafar") == expected
    assert as_methods(expected[0]) == expected[:1]
    assert as_methods((expected[0], "mustafar")) == expected
    for value in (5, None, 0.5):
        with pytest.raises(SparselandError, match=f"a list of them was expected, not {value}"):
            as_methods(value)
    with pytest.raises(SparselandError, match="a method or a spec was expected, not int"):
        as_methods([5])


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "lacks 'a'"),
        (torch.zeros(3, 2), r"'a' is \[3, 2\], this model's is \[2, 3\]"),
        (torch.zeros(2, 3, dtype=torch.int64), "finite numbers only"),
        (torch.full((2, 3), torch.nan), "finite numbers only"),
        (torch.full((2, 3), torch.inf), "finite numbers only"),
    ],
)
def test_a_calibration_gives_out_tensors_of_the_right_shape_only(tensor, words):
    found = Calibration({}, {} if tensor is None else {"a": tensor})
    with pytest.raises(SparselandError, match=words):
        found.tensor("sample", "a", (2, 3))


def test_a_calibration_gives_out_what_fits():
    bounds = torch.full((2,), -torch.inf)
    found = Calibration({}, {"a": torch.ones(2, 3), "bounds": bounds})
    assert found.tensor("sample", "a", (2, 3)) is found.tensors["a"]
    assert found.tensor("sample", "bounds", (2,), finite=False) is bounds
