import dataclasses

import pytest

from minitf import ModelConfig, count, token_tables

GOOD = {"vocabulary": 10, "width": 12, "heads": 3}


def refused(match, **fields):
    # Users have no type checker that runs: past the one of the tests, each field is set behind its back.
    config = ModelConfig(**GOOD)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=match):
        config.__post_init__()


@pytest.mark.parametrize("field", ["vocabulary", "layers", "width", "heads", "length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None])
def test_a_size_that_is_no_positive_whole_number_is_refused_by_name(field, value):
    refused(f"^{field} is {value!r}; it must be a whole number of at least 1$", **{field: value})


@pytest.mark.parametrize("field", ["head_width", "key_value_heads", "hidden"])
def test_a_size_that_follows_from_others_may_be_zero_but_not_negative(field):
    refused(f"^{field} is -2; it must be a whole number of at least 0$", **{field: -2})
    ModelConfig(**GOOD | {field: 0})


def test_a_vocabulary_of_nothing_is_refused():
    with pytest.raises(ValueError, match="^vocabulary is 0; it must be a whole number of at least 1$"):
        ModelConfig(vocabulary=0)


def test_heads_that_do_not_divide_the_width_are_refused_with_a_way_out():
    refused(
        "^5 heads do not divide a width of 12; choose a width that is a multiple of heads, or set head_width$",
        heads=5,
    )
    assert ModelConfig(**GOOD | {"heads": 5, "head_width": 4}).head_size == 4


def test_key_heads_that_do_not_divide_the_heads_are_refused():
    refused("^key_value_heads is 2, which does not divide the 3 heads$", key_value_heads=2)
    refused("^key_value_heads is 6, which does not divide the 3 heads$", key_value_heads=6)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("embedding", "onehot", "learned, one_hot"),
        ("attention", "linear", "query_key, table"),
        ("position", "absolute", "none, learned, sinusoidal, rotary, alibi"),
        ("norm", "batch", "none, l2, layer, rms"),
        ("norm_placement", "before", "pre, post"),
        ("feed_forward", "mlp", "none, relu, gelu, gelu_tanh, swiglu"),
        ("initializer", "xavier", "normal, fan_in, zeros"),
        ("norm", None, "none, l2, layer, rms"),
    ],
)
def test_an_unknown_choice_is_refused_with_the_known_ones(field, value, choices):
    refused(f"^{field} is {value!r}; choose one of {choices}$", **{field: value})


def test_table_attention_has_no_head_sizes():
    table = {"vocabulary": 12, "embedding": "one_hot", "attention": "table"}
    match = "^table attention mixes whole token vectors: leave head_width, key_value_heads at 0$"
    refused(match, **table, head_width=4)
    refused(match, **table, key_value_heads=3)
    assert ModelConfig(**GOOD | table | {"position": "none"}).head_size == 12


def test_one_hot_embeddings_are_as_wide_as_the_vocabulary_and_untied():
    match = "^one-hot embeddings are as wide as the vocabulary and cannot be tied; here width is 12, "
    refused(match + "vocabulary is 10, tied is False$", embedding="one_hot")
    refused(match + "vocabulary is 12, tied is True$", embedding="one_hot", vocabulary=12, tied=True)


def test_text_is_no_truth_value_and_no_number():
    refused("^causal is 'no'; it must be true or false$", causal="no")
    refused("^biases is 1; it must be true or false$", biases=1)
    refused("^norm_epsilon is 'small'; it must be a number$", norm_epsilon="small")
    refused("^embedding_scale is True; it must be a number$", embedding_scale=True)
    config = ModelConfig(**GOOD)
    object.__setattr__(config, "rotary_base", 10_000)  # a whole number is a number
    config.__post_init__()


def test_what_cannot_be_rotated_is_refused():
    rotary = {"position": "rotary"}
    refused(
        "^table attention has no queries and keys to rotate; choose another position$",
        **rotary,
        attention="table",
        embedding="one_hot",
        vocabulary=12,
    )
    match = "turns {} components; it must be an even number of at least 2$"
    refused("^rotary_fraction 0.75 of a head_width of 4 " + match.format(3), **rotary, rotary_fraction=0.75)
    refused("^rotary_fraction 0.1 of a head_width of 4 " + match.format(0), **rotary, rotary_fraction=0.1)
    refused("^rotary_fraction 0 of a head_width of 4 ", **rotary, rotary_fraction=0)
    refused("^rotary_fraction 2.0 of a head_width of 4 ", **rotary, rotary_fraction=2.0)
    refused("^rotary_base is -1.0; it must be positive$", **rotary, rotary_base=-1.0)
    refused(
        "^rotary_scaling is {'rule': 'linear'}; it must be a RotaryScaling",
        **rotary,
        rotary_scaling={"rule": "linear"},
    )
    assert ModelConfig(**GOOD, **rotary, rotary_fraction=0.5).rotated_width == 2


def test_parallel_layers_need_a_residual_and_no_norm_after_it():
    match = "^parallel layers need residual=True and norm_placement='pre'$"
    refused(match, parallel=True, residual=False)
    refused(match, parallel=True, norm_placement="post")


def test_a_norm_of_the_embedding_needs_a_norm():
    refused("^embedding_norm needs a norm, but norm is 'none'", embedding_norm=True, norm="none")


def test_a_negative_epsilon_is_refused():
    refused("^norm_epsilon is -1e-05; it must not be negative$", norm_epsilon=-1e-5)


def test_token_types_need_positions_that_are_added():
    match = "^the vector of the token type is added to those of the positions, and position is 'rotary'"
    refused(match, token_types=2, position="rotary")
    refused("^token_types is -1; it must be a whole number of at least 0$", token_types=-1)


def test_table_attention_has_no_queries_to_norm_or_to_add_biases_to():
    table = {"vocabulary": 12, "embedding": "one_hot", "attention": "table", "position": "none"}
    match = "^table attention has no queries and keys to norm or to add biases to"
    refused(match, **table, query_key_norm=True)
    refused(match, **table, query_key_value_biases=True)


def test_a_transform_before_the_unembedding_needs_a_norm_and_a_plain_activation():
    match = "^unembedding_transform uses the model's norm and its activation, .* norm is '{}' and .* is '{}'$"
    refused(match.format("none", "gelu_tanh"), unembedding_transform=True, norm="none")
    refused(match.format("layer", "swiglu"), unembedding_transform=True, feed_forward="swiglu")
    refused(match.format("layer", "none"), unembedding_transform=True, feed_forward="none")


def test_a_misspelt_field_is_an_error():
    with pytest.raises(TypeError, match="vocab_size"):
        ModelConfig(**GOOD, vocab_size=10)


def test_sizes_left_at_zero_follow_from_the_others():
    config = ModelConfig(**GOOD)
    assert (config.head_size, config.groups, config.hidden_size) == (4, 3, 48)


def test_a_config_is_a_frozen_value_that_can_be_a_static_argument():
    config = ModelConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 4
    assert hash(config) == hash(ModelConfig(**GOOD))
    assert config == ModelConfig(**dataclasses.asdict(config))


def test_the_papers_model_is_an_instance_of_the_same_config():
    config = token_tables(7)
    assert isinstance(config, ModelConfig)
    assert count(config) == 7 * 7 * 2
    with pytest.raises(ValueError, match="vocabulary is 0"):
        token_tables(0)
