"""Llama and its kin: Llama, TinyLlama, SmolLM ("llama"), Mistral, Qwen2, Qwen3, by ``model_type``.

All have rotary positions, root-mean-square norms and a SwiGLU (Touvron et al. 2023). Qwen2 adds biases to
queries, keys and values; Qwen3 norms each head's queries and keys instead. A sliding window (Jiang et al. 2023)
changes nothing for sequences that are no longer than it, so it becomes the model's ``length``.
"""

from functools import partial
from typing import Literal

from minitf.config import ModelConfig
from minitf.families import rotary, settings
from minitf.families.mapping import Family, Json, Tensor, linear, norm, projections

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
_LAYER = "model.layers.{}."


def config(model_type: ModelType, json: Json) -> ModelConfig:
    """Our configuration. Raises ValueError on what minitf cannot express."""
    heads, width = settings.whole(json, "num_attention_heads"), settings.whole(json, "hidden_size")
    # Where a number is missing, Llama takes the heads'; the others have defaults of their own, better not guessed.
    groups = {"default": heads} if model_type == "llama" or "num_key_value_heads" in json else {}
    head_width = {} if model_type == "qwen3" else {"default": width // heads}
    turning = rotary.read(json)
    if turning["rotary_fraction"] != 1:
        raise ValueError(f"config.json: partial_rotary_factor is {turning['rotary_fraction']}; here it must be 1")
    return ModelConfig(
        vocabulary=settings.whole(json, "vocab_size"),
        layers=settings.whole(json, "num_hidden_layers"),
        width=width,
        heads=heads,
        key_value_heads=settings.whole(json, "num_key_value_heads", **groups),
        head_width=settings.whole(json, "head_dim", **head_width),
        length=_length(model_type, json),
        hidden=settings.whole(json, "intermediate_size"),
        position="rotary",
        norm="rms",
        norm_epsilon=settings.number(json, "rms_norm_eps", 1e-6),
        feed_forward=settings.activation(json, "hidden_act", "silu", {"silu": "swiglu", "swish": "swiglu"}),
        tied=settings.flag(json, "tie_word_embeddings", False),
        biases=_biases(model_type, json),
        query_key_value_biases=model_type == "qwen2",
        query_key_norm=model_type == "qwen3",
        **turning,
    )


def _biases(model_type: ModelType, json: Json) -> bool:
    if model_type != "llama":
        settings.only(json, {"attention_bias": False, "mlp_bias": False}, "this family has none")
        return False
    attention, feed_forward = (settings.flag(json, name, False) for name in ("attention_bias", "mlp_bias"))
    if attention != feed_forward:
        raise ValueError(
            f"config.json: attention_bias is {attention} and mlp_bias is {feed_forward}; in minitf either all "
            "maps of a layer have biases or none"
        )
    return attention


def _length(model_type: ModelType, json: Json) -> int:
    length = settings.whole(json, "max_position_embeddings")
    if model_type == "llama":
        return length
    if model_type == "mistral":
        # A file without the setting means the family's default.
        window = settings.whole(json, "sliding_window", length) if "sliding_window" in json else 4096
        return min(length, window)
    settings.only(json, {"use_sliding_window": False}, "all layers see the same positions")
    if set(json.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        raise ValueError(f"config.json: layer_types is {json['layer_types']!r}; minitf has only full_attention")
    return length


def json(model_type: ModelType, config: ModelConfig) -> Json:
    """Their configuration."""
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    found: Json = {
        "model_type": model_type,
        "architectures": [f"{names[model_type]}ForCausalLM"],
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.head_size,
        "max_position_embeddings": config.length,
        "intermediate_size": config.hidden_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        **rotary.written(config),
    }
    if model_type == "llama":
        found |= {"attention_bias": config.biases, "mlp_bias": config.biases}
    if model_type == "mistral":
        found |= {"sliding_window": config.length}
    return found


_TENSORS = (
    Tensor("model.embed_tokens.weight", ("embedding",), "vocabulary width"),
    *norm(_LAYER + "input_layernorm", "layers.attention_norm"),
    *projections(_LAYER + "self_attn.", ("q_proj", "k_proj", "v_proj")),
    Tensor(_LAYER + "self_attn.q_norm.weight", ("layers.attention.query_gain",), "head_width"),
    Tensor(_LAYER + "self_attn.k_norm.weight", ("layers.attention.key_gain",), "head_width"),
    *linear(_LAYER + "self_attn.o_proj", "layers.attention.output", "width (head head_width)", "width"),
    *norm(_LAYER + "post_attention_layernorm", "layers.feed_forward_norm"),
    *linear(_LAYER + "mlp.gate_proj", "layers.feed_forward.into", "hidden width", "hidden"),
    *linear(_LAYER + "mlp.up_proj", "layers.feed_forward.gate", "hidden width", "hidden"),
    *linear(_LAYER + "mlp.down_proj", "layers.feed_forward.out", "width hidden", "width"),
    *norm("model.norm", "final_norm"),
    Tensor("lm_head.weight", ("unembedding",), "vocabulary width"),
)


def _family(model_type: ModelType) -> Family:
    return Family(
        partial(config, model_type),
        partial(json, model_type),
        _TENSORS,
        prefix="model.",
        # The rotary angles, kept as buffers by older versions; they follow from the configuration.
        ignorable=(
            r"model\.layers\.(?P<layer>\d+)\.self_attn\.rotary_emb\.inv_freq",
            r"model\.rotary_emb\.inv_freq",
        ),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
    )


LLAMA, MISTRAL, QWEN2, QWEN3 = (_family("llama"), _family("mistral"), _family("qwen2"), _family("qwen3"))
