"""Checkpoints under the names that their publishers gave the tensors, with all else that lies in the files."""

import re

import numpy as np
import pytest
from properties.checkpoints import change_tensors, refused, saved
from properties.models import bits
from safetensors.numpy import load_file

from minitf import ModelConfig
from minitf.pretrained import FAMILIES, load
from minitf.rotary import RotaryScaling

LAYERS, LENGTH = 2, 6
mask = np.tril(np.ones((1, 1, LENGTH, LENGTH)))
angles = np.ones(2, np.float32)


def each(name, value):
    return {name.format(layer): value for layer in range(LAYERS)}


# family -> what turns our name of a tensor into the published one, and what else is in the file.
PUBLISHED = {
    # gpt2 on the hub: the model without its head, with the causal mask as a number in every layer.
    "gpt2": (lambda name: name.removeprefix("transformer."), each("h.{}.attn.bias", mask.astype(np.float32))),
    # pythia: the mask as truth values, what it puts in place of a score, and the angles.
    "gpt_neox": (
        lambda name: name,
        each("gpt_neox.layers.{}.attention.bias", mask.astype(bool))
        | each("gpt_neox.layers.{}.attention.masked_bias", np.array(-1e9, np.float32))
        | each("gpt_neox.layers.{}.attention.rotary_emb.inv_freq", angles),
    ),
    # bloom-560m
    "bloom": (lambda name: name.removeprefix("transformer."), {}),
    # Llama 2 as converted in 2023
    "llama": (lambda name: name, each("model.layers.{}.self_attn.rotary_emb.inv_freq", angles)),
    # bert-base-uncased: TensorFlow's names of a norm, the head twice, and what pre-training had beside it.
    "bert": (
        lambda name: re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name).replace(
            "LayerNorm.weight", "LayerNorm.gamma"
        ),
        {
            "bert.pooler.dense.weight": np.ones((8, 8), np.float32),
            "bert.pooler.dense.bias": np.ones(8, np.float32),
            "cls.seq_relationship.weight": np.ones((2, 8), np.float32),
            "cls.seq_relationship.bias": np.ones(2, np.float32),
            "bert.embeddings.position_ids": np.arange(LENGTH)[None],
        },
    ),
}


def published(folder, family):
    """A small model as it would have been published; and its parameters."""
    saved(folder, family)
    before = load(folder).parameters
    rename, more = PUBLISHED[family]
    change_tensors(folder, lambda t: t.update({rename(name): t.pop(name) for name in list(t)} | more))
    return folder, before


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_published_file_is_the_same_model(family, tmp_path):
    folder, before = published(tmp_path, family)
    assert bits(load(folder).parameters) == bits(before)


def test_the_published_names_are_not_those_of_today(tmp_path):
    names = {
        family: set(load_file(published(tmp_path / family, family)[0] / "model.safetensors"))
        for family in PUBLISHED
    }
    assert {"wte.weight", "h.0.attn.c_attn.weight", "h.1.attn.bias", "ln_f.bias"} <= names["gpt2"]
    assert {"word_embeddings.weight", "word_embeddings_layernorm.bias", "h.0.mlp.dense_h_to_4h.weight"} <= names[
        "bloom"
    ]
    assert {"bert.embeddings.LayerNorm.gamma", "cls.predictions.transform.LayerNorm.beta"} <= names["bert"]


@pytest.mark.parametrize(
    ("family", "known", "odd"),
    [
        ("gpt2", "h.1.attn.bias", "h.2.attn.bias"),
        ("gpt2", "h.1.attn.bias", "h.1.attn.bias.weight"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias", "gpt_neox.layers.1.attention.masked"),
        ("gpt_neox", "gpt_neox.layers.1.attention.masked_bias", "gpt_neox.layers.1.mlp.masked_bias"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.1.mlp.rotary_emb.inv_freq"),
        ("bert", "bert.embeddings.position_ids", "bert.embeddings.position_id"),
        ("bert", "bert.pooler.dense.bias", "bert.pooler.dense.extra.bias"),
        ("bert", "cls.seq_relationship.bias", "cls.seq_relationship"),
    ],
)
def test_what_only_looks_like_something_known_is_an_error(family, known, odd, tmp_path):
    folder, _ = published(tmp_path, family)
    change_tensors(folder, lambda t: t.update({odd: t.pop(known)}))
    refused(f"has tensors that this model does not have: .*{odd}$", folder)


def test_the_published_configuration_of_llama_3_2_is_read():
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 128256,
    }
    assert FAMILIES["llama"].config(published) == ModelConfig(
        vocabulary=128256,
        layers=16,
        width=2048,
        heads=32,
        head_width=64,
        key_value_heads=8,
        length=131072,
        hidden=8192,
        tied=True,
        position="rotary",
        rotary_base=500000.0,
        rotary_scaling=RotaryScaling("llama3", 32.0, 8192, slow_turns=1.0, fast_turns=4.0),
        norm="rms",
        norm_epsilon=1e-5,
        feed_forward="swiglu",
    )


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_a_file_with_the_prefix_on_some_names_alone_is_an_error(family, tmp_path):
    folder, _ = published(tmp_path, family)
    change_tensors(folder, lambda t: t.update({"transformer.ln_f.bias": t.pop("ln_f.bias")}))
    refused("has tensors that this model does not have: ", folder)


@pytest.mark.parametrize("names", ["gamma weight", "beta bias"])
def test_a_norm_under_both_its_names_is_an_error(names, tmp_path):
    once, now = names.split()
    folder, _ = published(tmp_path, "bert")
    norm = "bert.encoder.layer.0.output.LayerNorm."
    change_tensors(folder, lambda t: t.update({norm + now: t[norm + once].copy()}))
    refused("are two names of one weight$", folder)
