"""The Transform: what each scope computes, its way through a file, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, cc_model

from cc_ds import CCModelForCausalLM
from cc_ds.config import ModelConfig
from cc_ds.connection.decision import DecisionMaker
from cc_ds.connection.transform import TrainedTransform, Transform
from cc_ds.models.lora import add_lora

LANGS = ("sw", "yo")


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def made(scope: str, rank: int | None) -> Transform:
    leading = {"shared": (), "per_layer": (LAYERS,), "per_language": (len(LANGS),)}[scope]
    factors = [draw(*leading, HIDDEN, HIDDEN)] if rank is None else [
        draw(*leading, HIDDEN, rank), draw(*leading, rank, HIDDEN)
    ]  # fmt: skip
    return Transform(factors, scope, LANGS if scope == "per_language" else ())


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("scope", ["shared", "per_layer", "per_language"])
def test_each_scope_row_by_row_and_through_a_file(scope, rank, tmp_path):
    transform = made(scope, rank)
    source, langs = draw(LAYERS, 4, HIDDEN), ["yo", "sw", None, "yo"]
    result = transform(source, langs)
    for layer in range(LAYERS):
        for row, lang in enumerate(langs):
            if scope == "per_language" and lang is None:
                assert not result[layer, row].any()
                continue
            which = {"shared": (), "per_layer": (layer,), "per_language": (LANGS.index(lang or "sw"),)}[scope]
            torch.testing.assert_close(
                result[layer, row], source[layer, row] @ transform.matrix[which], rtol=1e-4, atol=1e-4
            )
    model = cc_model()
    model.set_transform(transform)
    model.save_pretrained(tmp_path)
    again = CCModelForCausalLM.from_pretrained(tmp_path).transform
    assert (again.scope, again.languages, again.rank) == (scope, transform.languages, rank)
    assert all(torch.equal(a, b) for a, b in zip(again.factors, transform.factors, strict=True))


def test_it_moves_with_its_model_and_is_no_key_of_it():
    model = cc_model()
    keys = model.state_dict().keys()
    model.set_transform(made("shared", 5))
    assert model.state_dict().keys() == keys and not list(model.transform.parameters())
    assert model.to(torch.float64).transform.factors[0].dtype == torch.float64
    model.set_transform(None)
    assert model.transform is None


def test_an_unknown_or_missing_language_is_named():
    transform = made("per_language", None)
    with pytest.raises(ValueError, match="no matrix for language 'fr', only for sw, yo"):
        transform(draw(LAYERS, 2, HIDDEN), ["sw", "fr"])
    for langs in (None, ["sw"]):
        with pytest.raises(ValueError, match=r"name 2 languages \(one of sw, yo\)"):
            transform(draw(LAYERS, 2, HIDDEN), langs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.eye(4)], "by_row"), "scope is 'by_row'"),
        (([torch.eye(4)], "per_layer"), "no per_layer matrix"),
        (([torch.zeros(4)],), "no shared matrix"),
        (([torch.zeros(4, 2), torch.zeros(3, 4)],), "no shared matrix"),
        (([torch.zeros(2, 4, 4)], "per_language"), "names its languages"),
        (([torch.zeros(2, 4, 4)], "per_language", ["sw"]), "2 matrices for 1 languages"),
    ],
)
def test_bad_parts(arguments, message):
    with pytest.raises(ValueError, match=message):
        Transform(*arguments)


def test_a_file_with_half_of_two_factors_is_refused(tmp_path):
    model = cc_model()
    model.set_transform(made("shared", 5))
    model.save_pretrained(tmp_path)
    path = tmp_path / "cc_connection.safetensors"
    tensors = load_file(path)
    del tensors["transform.right"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"cc_connection.safetensors: .*either whole or two factors"):
        CCModelForCausalLM.from_pretrained(tmp_path)


def test_lora_leaves_the_connection_alone():
    pytest.importorskip("peft", reason="LoRA needs peft: pip install 'cc_ds[lora]'")
    model = cc_model(transform_share=0.5)
    add_lora(model, ModelConfig(model_name_or_path="unused", lora_rank=2))
    assert type(model.trained_transform) is TrainedTransform and type(model.decision_maker) is DecisionMaker
    assert any(".lora_A." in name for name, _ in model.named_parameters())
