"""A configuration that no model can have is refused with a sentence that says what would be right."""

import dataclasses

import pytest

from minitf.config import ModelConfig, token_tables


def made(**options):
    """A configuration made as in a program without runtime type checks, which tests have on."""
    config = object.__new__(ModelConfig)
    defaults = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    for name, value in {**defaults, **options}.items():
        object.__setattr__(config, name, value)
    config.__post_init__()
    return config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 0}, ["vocabulary is 0", "at least 1"]),
        ({"layers": 0}, ["layers is 0"]),
        ({"width": -4}, ["width is -4"]),
        ({"heads": 2.5}, ["heads is 2.5", "whole number"]),
        ({"length": True}, ["length is True"]),
        ({"hidden": -1}, ["hidden is -1"]),
        ({"width": 30, "heads": 4}, ["4 heads do not divide a width of 30", "head_width"]),
        ({"heads": 4, "key_value_heads": 3}, ["key_value_heads is 3", "4 heads"]),
        ({"norm": "batch"}, ["norm is 'batch'", "l2, layer, rms"]),
        ({"position": "absolute"}, ["position is 'absolute'", "rotary"]),
        ({"feed_forward": "tanh"}, ["feed_forward is 'tanh'", "swiglu"]),
        ({"initializer": "xavier"}, ["initializer is 'xavier'", "fan_in"]),
        ({"embedding": "one_hot"}, ["one-hot", "width is 64", "vocabulary is 50"]),
        ({"attention": "table", "head_width": 8}, ["table attention", "head_width"]),
        ({"attention": "table", "position": "rotary"}, ["table attention", "another position"]),
        ({"position": "rotary", "heads": 4, "rotary_fraction": 0.2}, ["turns 3", "even number"]),
        ({"position": "rotary", "rotary_fraction": 1.5}, ["rotary_fraction 1.5"]),
        ({"parallel": True, "norm_placement": "post"}, ["parallel", "norm_placement='pre'"]),
        ({"parallel": True, "residual": False}, ["parallel", "residual=True"]),
        ({"norm_epsilon": -1e-5}, ["norm_epsilon is -1e-05", "negative"]),
        ({"embedding_norm": True, "norm": "none"}, ["embedding_norm", "layer"]),
    ],
)
def test_an_impossible_model_is_refused_by_name(options, words):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the words are checked below
        made(**{"vocabulary": 50, **options})
    for word in words:
        assert word in str(refused.value)


def test_sizes_left_out_follow_from_the_others_also_after_a_replacement():
    config = ModelConfig(vocabulary=50, width=64, heads=4)
    assert (config.head_size, config.groups, config.hidden_size) == (16, 4, 256)
    wider = dataclasses.replace(config, width=128)
    assert (wider.head_size, wider.groups, wider.hidden_size) == (32, 4, 512)
    assert ModelConfig(vocabulary=50, heads=4, head_width=5, key_value_heads=2, hidden=7).head_size == 5


def test_a_configuration_is_hashable_so_that_it_can_be_static_under_jit():
    assert len({ModelConfig(vocabulary=50), ModelConfig(vocabulary=50), ModelConfig(vocabulary=51)}) == 2


def test_the_papers_model_is_an_instance_of_the_same_configuration():
    config = token_tables(34)
    assert isinstance(config, ModelConfig)
    assert (config.layers, config.heads, config.width, config.head_size, config.groups) == (1, 1, 34, 34, 1)
    assert (config.attend_self, config.residual, config.norm, config.position) == (False, False, "l2", "none")
