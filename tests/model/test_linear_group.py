"""The groups of a model: their order, their names, and when two of them are the same."""

from dataclasses import replace

import pytest

from model_helpers import make_model
from tsqp.model.config import ModelConfig, layer_groups, linear_groups, output_projection
from tsqp.model.hf_config import from_hf
from tsqp.model.linear_group import LinearGroup
from tsqp.wire.messages import place_of


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return from_hf(make_model().config.to_dict(), None)


def test_groups_come_layer_by_layer_and_the_output_projection_last(config: ModelConfig) -> None:
    places = [place_of(group) for group in linear_groups(config)]
    names = ["qkv", "o", "gate_up", "down"]
    assert places == [*((layer, name) for layer in (0, 1) for name in names), (-1, "lm_head")]


def test_sizes_are_those_of_all_parts(config: ModelConfig) -> None:
    shapes = [group.shape for group in layer_groups(config, 1)]
    assert shapes == [(64 + 2 * 32, 32), (32, 64), (2 * 64, 32), (32, 64)]
    assert output_projection(config).shape == (96, 32)


def test_messages_say_which_group_it_is(config: ModelConfig) -> None:
    assert str(layer_groups(config, 1).qkv) == "group qkv of layer 1"
    assert str(output_projection(config)) == "group lm_head"


def test_files_name_groups_as_they_always_did(config: ModelConfig) -> None:
    down, lm_head = layer_groups(config, 1).down, output_projection(config)
    assert down.integer_names == ("layers.1.down.weight", "layers.1.down.scale")
    assert down.hint_names == ("layers.1.down.hints_low", "layers.1.down.hints_high")
    assert lm_head.integer_names == ("lm_head.weight", "lm_head.scale")
    assert lm_head.hint_names == ("lm_head.hints_low", "lm_head.hints_high")


def test_a_group_is_the_same_wherever_its_place_is_the_same(config: ModelConfig) -> None:
    qkv = layer_groups(config, 1).qkv
    read = LinearGroup(1, "qkv", *qkv.shape)  # as a prepared file has it, without parts
    assert read == qkv and {qkv: "found"}[read] == "found"
    assert len({replace(qkv, layer=layer) for layer in (0, 1, None)}) == 3
    assert len(set(linear_groups(config))) == 9
