"""Recipes survive the disk and refuse what they can't trust."""

import json

import pytest
import torch

import sparseland as sl
from sparseland.method import Calibration, parse_spec
from sparseland.models.tiny import tiny_model


@pytest.fixture
def saved(tmp_path):
    calibration = Calibration({"note": [1, 2]}, {"layer.0.channels": torch.arange(6).view(2, 3)})
    method = parse_spec("double-sparsity:budget=1/8")
    recipe = sl.Recipe.of(tiny_model("llama"), [method], {"double-sparsity": calibration}, {"loss": 1.5})
    return recipe.save(tmp_path / "deep" / "recipe.json")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_what_is_saved_is_what_is_loaded(saved):
    recipe = sl.Recipe.load(saved)
    assert [m.spec for m in recipe.methods] == ["double-sparsity:budget=0.125"]
    assert recipe.evidence == {"loss": 1.5}
    assert recipe.calibrations["double-sparsity"].meta == {"note": [1, 2]}
    tensors = recipe.calibrations["double-sparsity"].tensors
    assert torch.equal(tensors["layer.0.channels"], torch.arange(6).view(2, 3))


def test_nothing_but_the_files_is_left_in_the_folder(saved):
    names = sorted(p.name for p in saved.parent.iterdir())
    assert names == ["recipe.double-sparsity.safetensors", "recipe.json"]


def test_a_recipe_for_other_shapes_is_refused(saved):
    with pytest.raises(sl.SparselandError, match=r"made for .* whose shapes differ"):
        sl.Recipe.load(saved).apply(tiny_model("qwen2", hidden_size=96))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("schema"), "no schema number"),
        (lambda d: d.update(schema=99), "newer than this sparseland"),
        (lambda d: d.update(schema=0), "schema 0, which never was"),
        (lambda d: d.update(schema=-3), "schema -3, which never was"),
        (lambda d: d.update(schema=True), "no schema number"),
        (lambda d: d.update(methods="x"), "'methods' must be a list"),
        (lambda d: d.update(methods=[3]), "must have a slug"),
        (lambda d: d["methods"][0].update(slug="nope"), "unknown method 'nope'"),
        (lambda d: d["methods"][0]["params"].update(budget=7), "budget=7 is not allowed"),
        (lambda d: d["methods"][0]["params"].update(surprise=1), "no parameter 'surprise'"),
        (
            lambda d: d.update(methods=[{"slug": "minference"}, {"slug": "flexprefill"}], calibration={}),
            "minference and flexprefill can't be combined",
        ),
        (lambda d: d["calibration"].update(other={}), "none of its methods"),
        (
            lambda d: d["calibration"]["double-sparsity"].update(tensors="../x.safetensors"),
            "beside the recipe",
        ),
        (lambda d: d["calibration"]["double-sparsity"].update(tensors="gone.safetensors"), "can't read"),
    ],
)
def test_a_spoilt_recipe_is_one_clear_line(saved, change, words):
    edit(saved, change)
    with pytest.raises(sl.SparselandError, match=words) as caught:
        sl.Recipe.load(saved)
    assert "\n" not in str(caught.value)
    assert str(saved.parent) in str(caught.value)


def test_evidence_that_json_can_not_hold_is_one_clear_line(tmp_path):
    for value in (float("nan"), object()):
        with pytest.raises(sl.SparselandError, match="holds what JSON can't"):
            sl.Recipe(["flexprefill"], evidence={"a": value}).save(tmp_path / "recipe.json")
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_recipe_is_refused(tmp_path, data):
    path = tmp_path / "recipe.json"
    path.write_bytes(data)
    with pytest.raises(sl.SparselandError, match="is not a recipe"):
        sl.Recipe.load(path)


def test_a_missing_recipe_and_a_truncated_tensor_file(saved, tmp_path):
    with pytest.raises(sl.SparselandError, match="can't read the recipe"):
        sl.Recipe.load(tmp_path / "none.json")
    tensors = saved.parent / "recipe.double-sparsity.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:20])
    with pytest.raises(sl.SparselandError, match="no valid safetensors"):
        sl.Recipe.load(saved)


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(sl.SparselandError, match="can't write the recipe"):
        sl.Recipe().save(tmp_path / "file" / "recipe.json")


def test_methods_may_be_given_as_one_line_of_specs():
    recipe = sl.Recipe("mustafar:sparsity=0.5,r-sparse")
    assert [m.spec for m in recipe.methods] == ["mustafar:sparsity=0.5", "r-sparse"]
