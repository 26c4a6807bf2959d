"""CCModelForCausalLM: mixed batches, defaults, saving, and what bad input is told."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from reference.two_pass import connected_logits, ffn_outputs
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, LAYERS, batch, cc_model, stock_twin
from transformers import AutoModelForCausalLM

from cc_ds import CCModelForCausalLM
from cc_ds.models.arch import FAMILIES, layers_of

ENGLISH = ("english_input_ids", "english_attention_mask", "english_anchors")


def _noise(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, LAYERS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_rows_without_english_pass_as_plain_sft_in_a_mixed_batch():
    model = cc_model(dtype=torch.float64).train()
    data, noise = batch(), _noise()
    data["english_attention_mask"][1] = 0
    data["english_anchors"][1] = 0
    mixed = model(**data, gate_noise=noise)
    plain = stock_twin(model)(input_ids=data["input_ids"][1:2], attention_mask=data["attention_mask"][1:2])
    real = data["attention_mask"][1].bool()
    torch.testing.assert_close(mixed.logits[1, real], plain.logits[0, real], atol=1e-12, rtol=0)
    assert mixed.choice[1].abs().sum() == 0
    alone = model(**{name: value[0:1] for name, value in data.items()}, gate_noise=noise[0:1])
    torch.testing.assert_close(mixed.logits[0, :8], alone.logits[0, :8], atol=1e-12, rtol=0)

    mixed.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_batch_without_any_english_gives_plain_gradients_and_none_to_the_gate():
    model = cc_model(dtype=torch.float64).train()
    data = batch()
    data["english_attention_mask"].zero_()
    model(**data, gate_noise=_noise()).loss.backward()
    twin = stock_twin(model).train()
    twin(input_ids=data["input_ids"], attention_mask=data["attention_mask"], labels=data["labels"]).loss.backward()
    assert model.decision_maker.weight.grad.abs().max() == 0
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, atol=1e-12, rtol=1e-9)


def test_without_english_arguments_it_is_the_stock_model():
    model = cc_model()
    data = {name: value for name, value in batch().items() if name not in (*ENGLISH, "anchors")}
    output, stock = model(**data), stock_twin(model)(**data)
    assert torch.equal(output.logits, stock.logits) and torch.equal(output.loss, stock.loss)
    assert output.choice is None and output.english_activations is None


def test_default_anchors_are_the_last_prompt_tokens():
    model = cc_model()
    data = batch()
    explicit = model(**data)
    implicit = model(**{name: value for name, value in data.items() if name not in ("anchors", "english_anchors")})
    assert torch.equal(explicit.logits, implicit.logits)
    without_labels = {name: value for name, value in data.items() if name not in ("anchors", "labels")}
    last = data["attention_mask"].sum(dim=1) - 1
    assert torch.equal(model(**without_labels).logits, model(**without_labels, anchors=last).logits)


def test_noise_is_drawn_in_training_and_zero_in_evaluation():
    model = cc_model()
    data = batch()
    zero = model(**data, gate_noise=torch.zeros(3, LAYERS))
    assert torch.equal(model(**data).logits, zero.logits)
    model.train()
    choices = torch.stack([model(**data).choice for _ in range(30)])
    assert (choices.std(dim=0) > 0).any()


def test_a_soft_gate_mixes_layers():
    model = cc_model(dtype=torch.float64, gate="soft", temperature=2.0)
    output = model(**batch(), gate_noise=_noise())
    expected = torch.softmax((output.decision_logits + _noise()) / 2.0, dim=-1)
    torch.testing.assert_close(output.choice, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_activations_at_the_norm_of_what_they_join(family):
    """Equal to the connection written out, with English activations scaled by hand."""
    model = cc_model(family, dtype=torch.float64, fuse_norm="match")
    data, noise = batch(), _noise()
    output = model(**data, gate_noise=noise)
    twin = stock_twin(model)
    layers = layers_of(twin, FAMILIES[model.config.model_type])
    english_LBH = ffn_outputs(twin, layers, *(data[name] for name in ENGLISH))
    joined_BH = ffn_outputs(twin, layers, data["input_ids"], data["attention_mask"], data["anchors"])[0]
    scaled_LBH = english_LBH / english_LBH.norm(dim=-1, keepdim=True) * joined_BH.norm(dim=-1, keepdim=True)
    weight = model.decision_maker.weight.detach()
    ids, mask, anchors = data["input_ids"], data["attention_mask"], data["anchors"]
    logits, _, _ = connected_logits(twin, layers, weight, scaled_LBH, ids, mask, anchors, noise)
    real = mask.bool()
    torch.testing.assert_close(output.logits[real], logits[real], atol=1e-10, rtol=0)
    torch.testing.assert_close(output.fusion_ratio, torch.ones(3), atol=1e-6, rtol=0, check_dtype=False)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=True cuts the gradient"):
        cc_model().activation_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path, caplog):
    model = cc_model(family, temperature=0.5)
    model.set_transform(torch.eye(HIDDEN))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        again = CCModelForCausalLM.from_pretrained(tmp_path)
    assert not any(info.values()), info
    assert not [record for record in caplog.records if record.levelno >= 30], caplog.text
    assert not isinstance(stock, CCModelForCausalLM)
    ids = batch()["input_ids"]
    assert torch.equal(stock(ids).logits, stock_twin(model)(ids).logits)
    assert again.cc_config == model.cc_config
    assert torch.equal(again.transform.matrix, model.transform.matrix)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(stock).__name__]


@pytest.mark.parametrize("connected", [True, False])
def test_a_model_of_the_hub_comes_with_its_connection(connected, tmp_path):
    model, commit = cc_model(fuse_layer=2), "0" * 40
    model.set_transform(torch.full((HIDDEN, HIDDEN), 3.0))
    (tmp_path / "models--user--name/refs").mkdir(parents=True)
    (tmp_path / "models--user--name/refs/main").write_text(commit)
    (model if connected else stock_twin(model)).save_pretrained(tmp_path / "models--user--name/snapshots" / commit)
    loaded = CCModelForCausalLM.from_pretrained("user/name", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert torch.equal(loaded.decision_maker.weight, model.decision_maker.weight) == connected
    assert (loaded.cc_config == model.cc_config) == connected
    assert (loaded.transform is not None) == connected
    assert not connected or torch.equal(loaded.transform.matrix, model.transform.matrix)


def test_a_transform_that_was_trained_is_saved_and_trained_on(tmp_path):
    model = cc_model(transform_share=0.5)
    matrix = torch.randn(HIDDEN, HIDDEN)
    with torch.no_grad():
        assert torch.equal(model.trained_transform.weight, torch.eye(HIDDEN))
        model.trained_transform.weight.copy_(matrix.T)
    model.save_pretrained(tmp_path)
    again = CCModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.transform.matrix, matrix)
    assert torch.equal(again.trained_transform.weight, matrix.T)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not isinstance(stock, CCModelForCausalLM)
    again.set_transform(2 * matrix)  # one that was fitted afterwards takes its place
    again.save_pretrained(tmp_path / "fitted")
    assert torch.equal(CCModelForCausalLM.from_pretrained(tmp_path / "fitted").transform.matrix, 2 * matrix)


def test_a_model_knows_whether_its_decision_maker_was_stored(tmp_path):
    model = cc_model()
    model.save_pretrained(tmp_path / "ours")
    stock_twin(model).save_pretrained(tmp_path / "stock")
    stock_twin(model).save_pretrained(tmp_path / "authors")
    path = tmp_path / "authors/model.safetensors"  # where it stands among the other weights
    authors = load_file(path) | {"model.source_select.weight": model.decision_maker.weight.detach()}
    save_file(authors, path, metadata={"format": "pt"})
    for name, stored in (("ours", True), ("stock", False), ("authors", True)):
        loaded = CCModelForCausalLM.from_pretrained(tmp_path / name)
        assert loaded.gate_was_stored == stored
        assert torch.equal(loaded.decision_maker.weight, model.decision_maker.weight) == stored


def test_a_plain_model_gets_a_decision_maker_as_hf_initialises_a_linear(tmp_path):
    stock_twin(cc_model()).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = CCModelForCausalLM.from_pretrained(tmp_path)
    weight = model.decision_maker.weight
    assert weight.shape == (LAYERS, HIDDEN)
    # normal(0, initializer_range), which is 0.2 here; torch's own Linear would be uniform within 0.18
    assert 0.15 < weight.std() < 0.25 and weight.abs().max() > 0.4
    torch.manual_seed(0)
    assert torch.equal(weight, CCModelForCausalLM.from_pretrained(tmp_path).decision_maker.weight)


class TestBadInput:
    @pytest.fixture
    def folder(self, tmp_path):
        model = cc_model()
        model.set_transform(torch.eye(HIDDEN))
        model.save_pretrained(tmp_path)
        return tmp_path

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(ValueError, match="no such model folder"):
            CCModelForCausalLM.from_pretrained(tmp_path / "nowhere")

    def test_a_folder_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"a model folder without weights \(no \*.safetensors\)"):
            CCModelForCausalLM.from_pretrained(folder)

    def test_pickled_weights_are_not_read(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match="are pickles and are not read"):
            CCModelForCausalLM.from_pretrained(folder)

    @pytest.mark.parametrize("shape", [(HIDDEN, HIDDEN + 1), (LAYERS + 1, HIDDEN, HIDDEN)])
    def test_a_matrix_of_the_wrong_size(self, shape):
        with pytest.raises(ValueError, match=rf"the transform has shape .*, this model needs \({HIDDEN}, {HIDDEN}\)"):
            cc_model().set_transform(torch.zeros(shape))

    def test_a_matrix_with_nan(self):
        matrix = torch.eye(HIDDEN)
        matrix[0, 1] = float("nan")
        with pytest.raises(ValueError, match="1 values that are NaN or Inf"):
            cc_model().set_transform(matrix)

    def test_a_stored_matrix_with_nan_is_named_by_its_file(self, folder):
        path = folder / "cc_connection.safetensors"
        tensors = load_file(path)
        tensors["transform"][0, 0] = float("inf")
        save_file(tensors, path)
        with pytest.raises(ValueError, match=r"cc_connection.safetensors: .*NaN or Inf"):
            CCModelForCausalLM.from_pretrained(folder)

    def test_a_truncated_connection(self, folder):
        path = folder / "cc_connection.safetensors"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"cc_connection.safetensors: truncated or not safetensors"):
            CCModelForCausalLM.from_pretrained(folder)

    def test_a_connection_of_another_model(self, folder):
        save_file({"decision_maker.weight": torch.zeros(LAYERS, 8)}, folder / "cc_connection.safetensors")
        with pytest.raises(ValueError, match=r"decision_maker.weight has shape \(3, 8\), the model needs \(3, 32\)"):
            CCModelForCausalLM.from_pretrained(folder)

    def test_an_unknown_connection_setting(self, folder):
        (folder / "cc_config.json").write_text('{"temprature": 1.0}')
        with pytest.raises(ValueError, match=r"cc_config.json: unknown key 'temprature'; did you mean 'temperature'"):
            CCModelForCausalLM.from_pretrained(folder)

    def test_a_fuse_layer_that_the_model_has_not(self):
        with pytest.raises(ValueError, match="fuse_layer is 3, but the model has layers 0 to 2"):
            cc_model(fuse_layer=3)

    def test_shapes(self):
        model, data = cc_model(), batch()
        with pytest.raises(ValueError, match=r"gate_noise must have shape \(3, 3\)"):
            model(**data, gate_noise=torch.zeros(3, LAYERS + 1))
        with pytest.raises(ValueError, match=r"anchors must have shape \(3,\)"):
            model(**(data | {"anchors": torch.zeros(2, dtype=torch.long)}))
