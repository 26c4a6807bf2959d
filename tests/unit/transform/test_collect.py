"""Collected activations against stock hooks on single, unpadded prompts; shards matched by pair id alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig

from cc_ds import CCModelForCausalLM
from cc_ds.data.templates import RenderedPrompt
from cc_ds.dist.group import Group
from cc_ds.transform import collect, fit_transform_result
from cc_ds.transform.collect import PromptPair, collect_activations
from cc_ds.transform.fit import fit_problems
from cc_ds.transform.shards import load_activations, mean_target, shard_path, shard_problems

LAYERS, HIDDEN = 3, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return CCModelForCausalLM.from_config(config).eval()


def prompt(rng: random.Random) -> RenderedPrompt:
    ids = [rng.randrange(3, 50) for _ in range(rng.randrange(4, 20))]
    # Anchors off the end too: an explicit anchor must be honoured.
    return RenderedPrompt(ids, rng.randrange(len(ids) - 2, len(ids)))


def some_pairs(count: int) -> list[PromptPair]:
    rng = random.Random(0)
    english = [prompt(rng) for _ in range(count // 2)]
    ids = rng.sample(range(1000), count)
    return [
        PromptPair(pair_id=i, lang="sw" if i % 2 else "yo", source=prompt(rng), target=rng.choice(english)) for i in ids
    ]


def collected(model, pairs, folder, **options):
    collect_activations(model, pairs, folder, **options)
    return load_activations(folder)


def by_hooks(model, one: RenderedPrompt) -> torch.Tensor:
    """(L, H): what each layer's MLP puts out at the anchor of one prompt without padding."""
    outputs = []
    handles = [
        layer.mlp.register_forward_hook(lambda _m, _i, out: outputs.append(out[0, one.anchor]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model.model(torch.tensor([one.ids]))
    for handle in handles:
        handle.remove()
    return torch.stack(outputs)


def test_equals_stock_hooks_pair_by_pair(model, tmp_path):
    pairs = some_pairs(11)
    found = collected(model, pairs, tmp_path, batch_size=3, pairs_per_shard=4)
    assert len(list(tmp_path.glob("pairs-*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.partial"))
    assert found.source.shape == found.target.shape == (11, LAYERS, HIDDEN)
    assert found.pair_id.tolist() == sorted(pair.pair_id for pair in pairs)
    by_id = {pair.pair_id: pair for pair in pairs}
    for row, pair_id in enumerate(found.pair_id.tolist()):
        pair = by_id[pair_id]
        assert found.langs[row] == pair.lang
        torch.testing.assert_close(found.source[row], by_hooks(model, pair.source), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.target[row], by_hooks(model, pair.target), rtol=1e-5, atol=1e-6)
    same = [[by_id[a].target == by_id[b].target for b in found.pair_id.tolist()] for a in found.pair_id.tolist()]
    assert (found.english_id[:, None] == found.english_id).tolist() == same


def test_order_of_pairs_and_of_shards_does_not_matter(model, tmp_path):
    pairs = some_pairs(9)
    one = collected(model, pairs, tmp_path / "one", batch_size=4, pairs_per_shard=3)
    two = collected(model, pairs[::-1], tmp_path / "two", batch_size=2, pairs_per_shard=100)
    torch.testing.assert_close(one.source, two.source, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.target, two.target, rtol=1e-5, atol=1e-6)
    assert one.langs == two.langs
    shards = sorted((tmp_path / "one").glob("*.safetensors"))
    shards[0].rename(tmp_path / "one" / "pairs-99999.safetensors")
    again = load_activations(tmp_path / "one")
    assert torch.equal(again.source, one.source) and again.langs == one.langs


def test_loading_follows_the_ids_asked_for(model, tmp_path):
    found = collected(model, some_pairs(6), tmp_path)
    wanted = [found.pair_id[4].item(), found.pair_id[1].item()]
    chosen = load_activations(tmp_path, wanted)
    assert chosen.pair_id.tolist() == wanted and chosen.langs == [found.langs[4], found.langs[1]]
    assert torch.equal(chosen.source, found.source[[4, 1]])


def test_shards_hold_the_model_dtype_and_the_mode_is_put_back(model, tmp_path):
    half = CCModelForCausalLM.from_config(model.config).to(torch.bfloat16).train()
    found = collected(half, some_pairs(4), tmp_path)
    assert found.source.dtype == found.target.dtype == torch.bfloat16
    assert half.training and not found.source.requires_grad
    with safe_open(next(tmp_path.glob("pairs-*.safetensors")), "pt") as shard:
        assert shard.get_tensor("pair_id").dtype == torch.int64 and "lang" in shard.metadata()


def test_english_prompts_are_read_once(model, tmp_path, monkeypatch):
    shared = RenderedPrompt([5, 6, 7], 2)
    pairs = [
        PromptPair(pair_id=i, lang="sw", source=RenderedPrompt([9, 8, 10][: 2 + i % 2], 1), target=shared)
        for i in range(6)
    ]
    read = []
    real = type(model).anchor_activations

    def counting(self, input_ids, attention_mask, anchors):
        assert attention_mask[:, 0].all(), "positions must start at the first token: padding belongs on the right"
        read.extend(input_ids[attention_mask.any(1)].tolist())
        return real(self, input_ids, attention_mask, anchors)

    monkeypatch.setattr(type(model), "anchor_activations", counting)
    collect_activations(model, pairs, tmp_path, batch_size=2)
    assert len(read) == 8 and read.count([5, 6, 7]) == 2  # once to know the model by, once for the pairs


def test_a_killed_collection_goes_on_where_it_was(model, tmp_path, monkeypatch):
    pairs = some_pairs(12)
    whole = collected(model, pairs, tmp_path / "whole", batch_size=2, pairs_per_shard=3)
    real, written = collect.write_shard, []

    def dying(tensors, langs, path):
        if len(written) == 2:
            path.with_suffix(".partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        real(tensors, langs, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(collect, "write_shard", dying)
        collect_activations(model, pairs, tmp_path / "cut", batch_size=2, pairs_per_shard=3)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("pairs-*.safetensors")}
    damaged = shard_path(tmp_path / "cut", 1)
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert collect_activations(model, pairs, tmp_path / "cut", batch_size=2, pairs_per_shard=3) == 3
    assert len(stamps) == 2 and shard_path(tmp_path / "cut", 0).stat().st_mtime_ns in stamps.values()
    again = load_activations(tmp_path / "cut")
    assert torch.equal(again.source, whole.source) and torch.equal(again.target, whole.target)
    assert torch.equal(again.pair_id, whole.pair_id) and again.langs == whole.langs
    assert collect_activations(model, pairs, tmp_path / "cut", batch_size=2, pairs_per_shard=3) == 0


def test_refuses_what_it_could_mix_up(model, tmp_path):
    pairs = some_pairs(4)
    with pytest.raises(ValueError, match="no prompt pairs"):
        collect_activations(model, [], tmp_path)
    with pytest.raises(ValueError, match="unique"):
        collect_activations(model, [pairs[0], pairs[0]], tmp_path)
    with pytest.raises(ValueError, match="no activation shards"):
        load_activations(tmp_path)
    collect_activations(model, pairs, tmp_path)
    with pytest.raises(ValueError, match="of other prompts"):
        collect_activations(model, pairs[:3], tmp_path)
    other = CCModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(ValueError, match="of another model"):
        collect_activations(other, pairs, tmp_path)
    with pytest.raises(ValueError, match="lack 1 pairs, pair 5000"):
        load_activations(tmp_path, [pairs[0].pair_id, 5000])
    shard = next(tmp_path.glob("pairs-*.safetensors"))
    (tmp_path / "pairs-00001.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(ValueError, match="a pair twice"):
        load_activations(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(ValueError, match="already holds activation shards"):
        collect_activations(model, pairs, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_goes_on_with_the_same_weights_alone(model, tmp_path, dtype):
    pairs, weights = some_pairs(4), copy.deepcopy(model).to(dtype)
    collect_activations(weights, pairs, tmp_path / "activations")
    weights.save_pretrained(tmp_path / "elsewhere")
    again = CCModelForCausalLM.from_pretrained(tmp_path / "elsewhere", torch_dtype=dtype)
    with torch.no_grad():
        again.decision_maker.weight.zero_()  # the activations are without a connection
        assert collect_activations(again, pairs, tmp_path / "activations") == 0
        weight = again.model.layers[1].mlp.up_proj.weight
        weight.mul_(1.01)  # within what other kernels may change in bf16
    with pytest.raises(ValueError, match="of another model"):
        collect_activations(again, pairs, tmp_path / "activations")


@pytest.mark.parametrize("scope", ["shared", "per_layer", "per_language"])
def test_shards_are_fitted_as_the_tensors_would_be(model, tmp_path, scope):
    """And from two ranks' halves of the shards as from all of them."""
    found = collected(model, some_pairs(40), tmp_path, pairs_per_shard=7)
    ids = found.pair_id.tolist()
    expected = fit_transform_result(found.source, found.target, ridge=0.1, scope=scope, langs=found.langs)
    problems = shard_problems(tmp_path, scope, set(ids[:30]), set(ids[30:]))
    fitted = fit_problems(problems, HIDDEN, scope, ridge=0.1)
    assert fitted.problems == expected.problems and fitted.rows == expected.rows
    assert fitted.transform.languages == (("sw", "yo") if scope == "per_language" else ())
    torch.testing.assert_close(fitted.transform.matrix, expected.transform.matrix, rtol=1e-4, atol=1e-4)
    halves = [shard_problems(tmp_path, scope, set(ids), set(), Group(rank, 2, torch.device("cpu"))) for rank in (0, 1)]
    rows = [sum(len(source) for problem in half for source, _, _ in problem.rows()) for half in halves]
    assert min(rows) > 0 and sum(rows) == 40 * LAYERS
    torch.testing.assert_close(mean_target(tmp_path, set(ids)).float(), found.target.mean(0), rtol=1e-4, atol=1e-5)
