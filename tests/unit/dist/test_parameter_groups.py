"""Which parameters decay, and which learn at the connection's rate."""

import pytest

from cc_ds.config import ModelConfig, TrainConfig
from cc_ds.dist.engine import parameter_groups
from cc_ds.models.lora import add_lora
from tests.tiny_models import cc_model


def names(model, **settings):
    """{(weight decay, learning rate): names of the group}."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, TrainConfig(output_dir="unused", weight_decay=0.1, **settings))
    return {(g["weight_decay"], g.get("lr")): {by_id[id(p)] for p in g["params"]} for g in groups}


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_the_connection_has_its_own_rate_where_one_is_given(own):
    model = cc_model(transform_share=own)
    groups = names(model, connection_learning_rate=1e-3)
    assert groups[0.1, 1e-3] == {"decision_maker.weight"} | ({"trained_transform.weight"} if own else set())
    assert all("norm" in name for name in groups[0.0, None])
    everything = {name for name, _ in model.named_parameters()}
    assert set.union(*groups.values()) == everything and sum(map(len, groups.values())) == len(everything)


def test_without_one_it_learns_with_the_weights():
    groups = names(cc_model())
    assert groups.keys() == {(0.1, None), (0.0, None)} and "decision_maker.weight" in groups[0.1, None]


def test_adapters_learn_at_the_models_rate():
    model = cc_model()
    add_lora(model, ModelConfig(model_name_or_path="unused", lora_rank=2))
    groups = names(model, connection_learning_rate=1e-3)
    assert groups[0.1, 1e-3] == {"decision_maker.weight"} and groups.keys() == {(0.1, None), (0.1, 1e-3)}
    assert all(".lora_" in name for name in groups[0.1, None])
