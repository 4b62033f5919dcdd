import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.checkpoints import CONFIGS, change_settings, change_tensors, made, refused, saved
from properties.models import SCALINGS, bits, examples
from safetensors.numpy import load_file, save_file

from minitf import pretrained
from minitf.declaration import count
from minitf.parameters import split_layers
from minitf.pretrained import FAMILIES, load, save
from minitf.rotary import RotaryScaling
from minitf.vocabulary import Characters, Tokenizer


def test_every_family_has_a_model_in_these_tests():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize(
    # The masked-token head of BERT always reads the embedding.
    ("family", "tied"),
    [(family, tied) for family in CONFIGS for tied in (False, True) if tied or family != "bert"],
)
def test_what_is_saved_comes_back_the_same_to_the_bit(family, tied, tmp_path):
    model = made(family, tied=tied)
    save(tmp_path / "a" / "model", model)
    again = load(tmp_path / "a" / "model")
    assert again.family == family and again.tokenizer is None
    assert pretrained._differences(model.config, again.config) == []
    assert bits(again.parameters) == bits(model.parameters)
    assert sorted(file.name for file in (tmp_path / "a" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_file_holds_every_weight_once_and_nothing_else(family, tmp_path):
    folder = saved(tmp_path, family)
    assert sum(x.size for x in load_file(folder / "model.safetensors").values()) == count(CONFIGS[family])


@pytest.mark.parametrize("family", CONFIGS)
@examples(15)
@given(data=st.data())
def test_a_configuration_that_a_family_can_say_comes_back_from_its_json(family, data):
    pick = lambda *options: data.draw(st.sampled_from(options))
    changes = {
        "vocabulary": pick(5, 11),
        "layers": pick(1, 3),
        "width": pick(8, 16),
        "length": pick(6, 9),
        "norm_epsilon": pick(1e-5, 1e-6, 0.25),
    }
    if family != "bert":
        changes["tied"] = pick(False, True)
    if family in ("gpt2", "gpt_neox", "bert"):
        changes |= {"feed_forward": pick("relu", "gelu", "gelu_tanh"), "hidden": pick(0, 12)}
    if CONFIGS[family].position == "rotary":
        changes |= {"rotary_base": pick(1e4, 1e6), "rotary_scaling": pick(None, *SCALINGS)}
    if family == "gpt_neox":
        changes |= {"parallel": pick(False, True), "rotary_fraction": pick(0.5, 1.0)}
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        changes |= {"heads": pick(2, 4), "key_value_heads": pick(0, 1, 2), "head_width": pick(4, 6)}
    if family == "llama":
        changes["biases"] = pick(False, True)
    if family == "bloom":
        changes["hidden"] = 4 * changes["width"]
    config = replace(CONFIGS[family], **changes)
    again = FAMILIES[family].config(json.loads(json.dumps(FAMILIES[family].json(config))))
    assert pretrained._differences(config, again) == []


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {"attend_self": False}, "attend_self=False"),
        ("gpt2", {"position": "rotary"}, "position='rotary'"),
        ("gpt2", {"head_width": 6}, "head_width=6"),
        ("gpt2", {"key_value_heads": 1}, "key_value_heads=1"),
        ("gpt2", {"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ("llama", {"norm": "layer"}, "norm='layer'"),
        ("llama", {"rotary_interleaved": True}, "rotary_interleaved=True"),
        ("llama", {"rotary_fraction": 2 / 3}, "rotary_fraction="),
        ("llama", {"query_key_norm": True}, "query_key_norm=True"),
        ("qwen3", {"query_key_norm": False}, "query_key_norm=False"),
        ("mistral", {"biases": True}, "biases=True"),
        ("bloom", {"hidden": 12}, "hidden=12"),
        ("bert", {"causal": True}, "causal=True"),
    ],
)
def test_a_model_that_the_family_cannot_say_is_not_saved(family, changes, said, tmp_path):
    with pytest.raises(ValueError, match=f"^the family {family} cannot express this configuration: .*{said}"):
        save(tmp_path / "model", made(family, **changes))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("there", ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_folder_that_holds_a_model_is_not_written_over(there, tmp_path):
    (tmp_path / there).write_text("kept")
    with pytest.raises(ValueError, match=f"holds a model already \\({there}\\); choose another folder$"):
        save(tmp_path, made("gpt2"))
    assert [file.name for file in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "kept"


def test_a_folder_with_other_files_may_be_saved_to_but_not_a_file(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="notes.txt is a file; give a folder$"):
        saved(tmp_path / "notes.txt")


def test_parameters_that_are_not_the_models_are_not_saved(tmp_path):
    model = made("gpt2")
    other = made("gpt2", width=16)
    with pytest.raises(ValueError, match=r"not of this model: embedding has the shape \(11, 16\), .* \(11, 8\)$"):
        save(tmp_path, replace(model, parameters=other.parameters))
    with pytest.raises(ValueError, match="^the parameters are not of this model: they have unembedding$"):
        save(tmp_path, replace(model, parameters=made("gpt2", tied=False).parameters))
    spoilt = replace(model.parameters, embedding=model.parameters.embedding.at[0, 0].set(jnp.nan))
    with pytest.raises(
        ValueError, match="^the weight embedding holds 1 numbers that are NaN or infinite, out of 88$"
    ):
        save(tmp_path, replace(model, parameters=spoilt))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gpt2", "minitf"])
def test_single_layers_are_saved_as_those_of_the_stack(family, tmp_path):
    model = replace(made("gpt2"), family=family)
    save(tmp_path, replace(model, parameters=split_layers(model.parameters)))
    assert bits(load(tmp_path).parameters) == bits(model.parameters)


def test_our_own_files_keep_the_vocabulary_and_are_as_strict(tmp_path):
    model = replace(made("gpt2"), family="minitf", tokenizer=Tokenizer(Characters(" abcdefghij")))
    save(tmp_path / "new" / "model", model)
    again = load(tmp_path / "new" / "model")
    assert again.tokenizer.encode("a cab") == model.tokenizer.encode("a cab") and again.config == model.config
    spoilt = replace(model.parameters, embedding=model.parameters.embedding.at[0, 0].set(jnp.nan))
    single = split_layers(made("gpt2", hidden=24).parameters)
    for wrong, told in (
        (spoilt, "^the weight embedding holds 1 numbers that are NaN"),
        (made("gpt2", width=16).parameters, r"embedding has the shape \(11, 16\)"),
        (single, r"layers.0.feed_forward.into has the shape \(8, 24\)"),
    ):
        with pytest.raises(ValueError, match=told):
            save(tmp_path / "other", replace(model, parameters=wrong))
    assert not (tmp_path / "other").exists()


def test_a_family_that_is_not_there_is_not_saved(tmp_path):
    with pytest.raises(
        ValueError, match="^family is 'gtp2', which minitf does not have; it has bert, bloom, gpt2"
    ):
        save(tmp_path, replace(made("gpt2"), family="gtp2"))
    with pytest.raises(ValueError, match="convert with minitf.families.llama2c.as_llama"):
        save(tmp_path, replace(made("llama"), family="llama2c"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
def test_the_numbers_are_read_in_the_precision_asked_for(dtype, tmp_path):
    folder = saved(tmp_path)
    whole = load(folder).parameters
    found = load(folder, dtype=dtype).parameters
    assert bits(found) == bits(jax.tree.map(lambda x: x.astype(dtype), whole))
    save(tmp_path / "again", replace(made("gpt2"), parameters=found))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    assert bits(load(tmp_path / "again", dtype=dtype).parameters) == bits(found)


def test_a_precision_that_cannot_be_is_refused(tmp_path):
    folder = saved(tmp_path)
    refused("^dtype is int32; parameters are floating-point", folder, dtype=jnp.int32)
    change_tensors(folder, lambda t: t["transformer.wte.weight"].__setitem__((0, 0), 1e6))
    refused(
        "the tensor transformer.wte.weight has numbers that are too large for float16", folder, dtype=jnp.float16
    )
    load(folder, dtype=jnp.bfloat16)
    refused("^dtype is float64, which JAX has only under jax.enable_x64", folder, dtype=jnp.float64)
    with jax.enable_x64(True):
        assert load(folder, dtype="float64").parameters.embedding.dtype == jnp.float64


# Names in files.


def test_unknown_and_missing_tensors_are_named(tmp_path):
    folder = saved(tmp_path)
    change_tensors(folder, lambda t: t.update({"transformer.h.0.extra": t.pop("transformer.wpe.weight")}))
    refused(f"^{folder} has tensors that this model does not have: transformer.h.0.extra$", folder)
    change_tensors(folder, lambda t: t.pop("transformer.h.0.extra"))
    refused(f"^{folder} lacks tensors that this model has: transformer.wpe.weight$", folder)


def test_of_many_wrong_names_some_are_shown_and_the_rest_counted(tmp_path):
    folder = saved(tmp_path)
    change_settings(folder, n_layer=3)
    refused("lacks tensors that this model has: transformer.h.2.attn.c_attn.bias, .* and 6 more$", folder)
    change_settings(folder, n_layer=1)
    refused("has tensors that this model does not have: transformer.h.1.attn.c_attn.bias, .* and 6 more$", folder)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path):
    folder = saved(tmp_path)
    change_tensors(folder, lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"][:5]}))
    refused(r"the tensor transformer.wpe.weight has the shape \(5, 8\), but .* it would be \(6, 8\)$", folder)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused_with_the_tensors_name(bad, tmp_path):
    folder = saved(tmp_path)
    change_tensors(folder, lambda t: t["transformer.h.1.mlp.c_fc.bias"].__setitem__(3, bad))
    refused(
        "the tensor transformer.h.1.mlp.c_fc.bias holds 1 numbers that are NaN or infinite, out of 12$", folder
    )


def test_weights_that_are_whole_numbers_are_refused(tmp_path):
    folder = saved(tmp_path)
    change_tensors(folder, lambda t: t.update({"transformer.ln_f.bias": np.zeros(8, np.int32)}))
    refused("the tensor transformer.ln_f.bias is of int32; weights are floating-point numbers$", folder)


@pytest.mark.parametrize(
    ("family", "copy", "original"),
    [
        ("gpt2", "lm_head.weight", "transformer.wte.weight"),
        ("bloom", "lm_head.weight", "transformer.word_embeddings.weight"),
        ("llama", "lm_head.weight", "model.embed_tokens.weight"),
        ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
    ],
)
def test_a_tied_tensor_may_be_there_twice_but_only_with_the_same_numbers(family, copy, original, tmp_path):
    folder = saved(tmp_path, family, tied=True)
    before = bits(load(folder).parameters)
    change_tensors(folder, lambda t: t.update({copy: t[original].copy()}))
    assert bits(load(folder).parameters) == before
    change_tensors(folder, lambda t: t[copy].__setitem__((0,) * t[copy].ndim, 7.0))
    refused(f"{copy} should be the same as {original}, .* but the two differ$", folder)


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer.")])
def test_the_prefix_of_the_model_may_be_missing(family, prefix, tmp_path):
    folder = saved(tmp_path, family)
    before = bits(load(folder).parameters)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
    bare |= {"h.0.attn.bias": np.ones((1, 1, 6, 6), np.uint8)} if family == "gpt2" else {}
    save_file(bare, folder / "model.safetensors")
    assert bits(load(folder).parameters) == before


@pytest.mark.parametrize(
    ("family", "buffer", "beyond"),
    [
        ("gpt2", "transformer.h.1.attn.masked_bias", "transformer.h.2.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.1.attention.bias", "gpt_neox.layers.2.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", "gpt_neox.layers.0.attention.inv_freq"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.self_attn.rotary_emb.inv_freq"),
        ("bert", "bert.pooler.dense.weight", "bert.pool.dense.weight"),
        ("bert", "cls.seq_relationship.weight", "cls.relationship.weight"),
    ],
)
def test_buffers_that_do_nothing_are_passed_over_but_only_known_ones(family, buffer, beyond, tmp_path):
    folder = saved(tmp_path, family)
    before = bits(load(folder).parameters)
    change_tensors(folder, lambda t: t.update({buffer: np.zeros(3, np.float32)}))
    assert bits(load(folder).parameters) == before
    change_tensors(folder, lambda t: t.update({beyond: t.pop(buffer)}))
    refused(f"has tensors that this model does not have: {beyond}$", folder)


@pytest.mark.parametrize(
    ("family", "now", "once"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("bert", "bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("bert", "bert.encoder.layer.1.output.LayerNorm.bias", "bert.encoder.layer.1.output.LayerNorm.beta"),
    ],
)
def test_other_names_of_a_tensor_are_known(family, now, once, tmp_path):
    folder = saved(tmp_path, family)
    before = bits(load(folder).parameters)
    change_tensors(folder, lambda t: t.update({once: t.pop(now)}))
    assert bits(load(folder).parameters) == before
    change_tensors(folder, lambda t: t.update({now: t[once].copy()}))
    refused("are two names of one weight$", folder)


# Settings.


def test_a_configuration_file_that_is_none_is_refused(tmp_path):
    folder = saved(tmp_path)
    file = folder / "config.json"
    for text, match in [
        ("{", "config.json is not valid JSON: "),
        (b"\xff\xfe\x00", "config.json is not valid JSON: "),
        ("[1]", "config.json holds a JSON list, not an object of settings$"),
        ("{}", "config.json: model_type is None, which minitf does not have; it has bert, bloom"),
        ('{"model_type": "t5"}', "config.json: model_type is 't5', which minitf does not have; it has bert"),
        ("[" * 200_000, "config.json is not valid JSON: "),
        ('{"model_type": "gpt2"}', "config.json has no 'vocab_size'|has no 'vocab_size', without which"),
    ]:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(match, folder)
    file.write_text('{"made_by": "minitf"}')
    for inner in ("models/0", "model"):
        saved(folder / inner)
        refused(f"is the folder of a run; its model is in .*{inner}$", folder)
    file.unlink()
    refused("has no config.json, without which the model is not known$", folder)


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4,
}


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("gpt2", {"n_layer": 0}, "n_layer is 0; it must be a positive whole number"),
        ("gpt2", {"n_embd": "8"}, "n_embd is '8'; it must be a positive whole number"),
        ("gpt2", {"n_head": 3}, "3 heads do not divide a width of 8"),
        ("gpt2", {"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1; it must be a positive number"),
        ("gpt2", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
        ("gpt2", {"activation_function": "mish"}, "activation_function is 'mish'; minitf has gelu_new, "),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, but minitf can only have True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "the weights are quantized"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias is False"),
        ("gpt_neox", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gpt_neox", {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "has no 'factor'"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; minitf has silu"),
        ("llama", {"attention_bias": True}, "attention_bias is True and mlp_bias is False"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling .* by the rule 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": ["yarn"]}}, "rope_parameters .* by the rule \\['yarn'\\]"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters differ in",
        ),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": "2"}}, "factor is '2'; it must be"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4}}, "slow_turns of rotary_scaling is 4.0"),
        ("llama", {"rope_parameters": LLAMA3 | {"beta_fast": 4}}, r"does not know: \['beta_fast'\]"),
        ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 5}, "is 5, but among .* is 4$"),
        ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 4}}, "yarn cannot slow 6"),
        ("llama", {"rope_parameters": {"full_attention": ROPE}}, "rope_parameters is .* which minitf cannot read"),
        (
            "llama",
            {"rope_parameters": ROPE | {"factor": 2.0}},
            r"settings that minitf does not know: \['factor'\]",
        ),
        ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": None, "rope_theta": "high"}, "rope_theta is 'high'"),
        ("llama", {"num_key_value_heads": 3}, "key_value_heads is 3, which does not divide the 2 heads"),
        ("mistral", {"attention_bias": True}, "attention_bias is True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*sliding_attention"),
        ("llama", {"hidden_act": ["silu"]}, r"the activation hidden_act is \['silu'\]; minitf has"),
        ("qwen3", {"head_dim": None}, "has no 'head_dim'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder is True"),
        ("bert", {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        (
            "bert",
            {"architectures": ["BertModel"]},
            "the architecture is BertModel, which has no masked-token head",
        ),
    ],
)
def test_a_setting_that_minitf_does_not_compute_is_refused(family, changes, match, tmp_path):
    folder = saved(tmp_path, family)
    change_settings(folder, **changes)
    refused(f"^{folder}/config.json: .*{match}|^{folder}/config.json: {match}", folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_hidden_layers": 10**7}, r"\d+ tensors are not those of 10000000 layers$"),
        (
            {"vocab_size": 10**30},
            r"the tensor .* with this configuration it would be .*10{30}",
        ),
    ],
)
def test_sizes_beyond_all_measure_are_refused_as_any_others(changes, match, tmp_path):
    folder = saved(tmp_path, "llama")
    change_settings(folder, **changes)
    refused(match, folder)


def test_older_names_of_rotary_settings_are_read(tmp_path):
    folder = saved(tmp_path, "gpt_neox")
    change_settings(folder, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500)
    assert (load(folder).config.rotary_fraction, load(folder).config.rotary_base) == (0.5, 500.0)
    folder = saved(tmp_path / "llama", "llama")
    change_settings(folder, rope_parameters=None, rope_scaling=None, rope_theta=500)
    assert load(folder).config.rotary_base == 500.0


def test_a_model_that_was_stretched_is_read_from_either_form_and_kept(tmp_path):
    folder = saved(tmp_path / "model", "llama")
    older = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    expected = RotaryScaling("llama3", 8.0, 4, 1.0, 4.0)
    for settings in (
        {"rope_parameters": LLAMA3},
        {"rope_parameters": None, "rope_scaling": older},
        {"rope_parameters": LLAMA3, "rope_scaling": older},
    ):
        change_settings(folder, rope_scaling=None)
        change_settings(folder, **settings)
        assert load(folder).config.rotary_scaling == expected
    save(tmp_path / "again", load(folder))
    assert load(tmp_path / "again").config == load(folder).config
    # The length before, when nothing says it, is the length now; and Qwen's older files say "type".
    change_settings(
        folder, rope_parameters=None, max_position_embeddings=64, rope_scaling={"type": "yarn", "factor": 4.0}
    )
    found = load(folder).config.rotary_scaling
    assert found == RotaryScaling("yarn", 4.0, 64, 1.0, 32.0, 1 + 0.1 * math.log(4.0))
    change_settings(folder, original_max_position_embeddings=32)
    assert load(folder).config.rotary_scaling.original_length == 32


def test_a_family_does_not_lose_what_its_rule_does_not_say(tmp_path):
    model = made("llama", rotary_scaling=RotaryScaling("linear", 2.0, attention_factor=1.5))
    with pytest.raises(ValueError, match="^the family llama cannot express .* rotary_scaling=RotaryScaling"):
        save(tmp_path / "model", model)


def test_a_sliding_window_shorter_than_the_positions_becomes_the_length(tmp_path):
    folder = saved(tmp_path, "mistral")
    change_settings(folder, sliding_window=4)
    assert load(folder).config.length == 4
    change_settings(folder, sliding_window=None)
    assert load(folder).config.length == 6


# GPT-2's tokenizer.


def test_gpt2s_tokenizer_comes_with_its_vocabulary_where_its_files_are(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", vocabulary=50257, layers=1)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    assert load(folder).tokenizer is None
    shared = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
    cache = shared / "data" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"GPT-2's tokenizer is not in {cache}; set MINITF_SHARED to the folder above data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    found = load(folder).tokenizer
    assert found.n_vocab == 50257 and found.encode("Hello world") == [15496, 995]
    # A model of another language, with as many tokens, brings merges of its own.
    (folder / "merges.txt").write_text("#version: 0.2\ne n\n")
    assert load(folder).tokenizer is None
    digest = lambda data: hashlib.sha256(data).hexdigest()
    (merges,) = (
        d for d in (path.read_bytes() for path in cache.iterdir()) if digest(d) == pretrained._GPT2_MERGES
    )
    (folder / "merges.txt").write_bytes(merges)
    assert load(folder).tokenizer is not None
