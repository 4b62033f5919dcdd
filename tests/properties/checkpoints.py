"""Small checkpoints of every family, and ways to spoil them."""

import json
from dataclasses import replace

import jax.numpy as jnp
import pytest
from properties.models import random_parameters
from safetensors.numpy import load_file, save_file

from minitf import ModelConfig
from minitf.pretrained import Pretrained, load, save

SIZES = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 2, "length": 6, "hidden": 12}
LLAMA = {"position": "rotary", "norm": "rms", "feed_forward": "swiglu", "head_width": 6, "key_value_heads": 1}
BERT = {
    "causal": False,
    "norm_placement": "post",
    "embedding_norm": True,
    "feed_forward": "gelu",
    "tied": True,
    "biases": True,
    "unembedding_bias": True,
    "unembedding_transform": True,
    "token_types": 2,
}
CONFIGS = {
    "gpt2": ModelConfig(**SIZES, biases=True, tied=True),
    "gpt_neox": ModelConfig(**SIZES, biases=True, position="rotary", rotary_fraction=0.5, parallel=True),
    "bloom": ModelConfig(**SIZES | {"hidden": 32}, biases=True, tied=True, position="alibi", embedding_norm=True),
    "llama": ModelConfig(**SIZES, **LLAMA),
    "mistral": ModelConfig(**SIZES, **LLAMA),
    "qwen2": ModelConfig(**SIZES, **LLAMA, query_key_value_biases=True),
    "qwen3": ModelConfig(**SIZES, **LLAMA, query_key_norm=True),
    "bert": ModelConfig(**SIZES, **BERT),
}


def made(family, seed=0, dtype=jnp.float32, **changes):
    config = replace(CONFIGS[family], **changes)
    return Pretrained(family, config, random_parameters(config, seed, dtype))


def saved(folder, family="gpt2", **changes):
    save(folder, made(family, **changes))
    return folder


def refused(match, source, **options):
    with pytest.raises(ValueError, match=match):
        load(source, **options)


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


def change_tensors(folder, change):
    """Rewrite the file of weights: ``change`` gets the table of tensors and alters it."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
