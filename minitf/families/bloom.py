"""BLOOM (Le Scao et al. 2022): ALiBi instead of positions, a norm on the embedding."""

from minitf.config import ModelConfig
from minitf.families import settings
from minitf.families.mapping import Family, Json, Tensor, fused, linear, norm

_LAYER = "transformer.h.{}."


def config(json: Json) -> ModelConfig:
    """Our configuration. Raises ValueError on what minitf cannot express.

    ALiBi has no longest sequence; ``length`` is the one it was trained with (``seq_length``, else 2048).
    """
    settings.only(
        json, {"apply_residual_connection_post_layernorm": False}, "what is added to is the stream, not its norm"
    )
    # Older files call the width n_embed.
    width = settings.whole(json, "hidden_size", json.get("n_embed"))
    return ModelConfig(
        vocabulary=settings.whole(json, "vocab_size"),
        layers=settings.whole(json, "n_layer", json.get("num_hidden_layers")),
        width=width,
        heads=settings.whole(json, "n_head", json.get("num_attention_heads")),
        length=settings.whole(json, "seq_length", 2048),
        position="alibi",
        embedding_norm=True,
        feed_forward="gelu_tanh",
        norm_epsilon=settings.number(json, "layer_norm_epsilon", 1e-5),
        tied=settings.flag(json, "tie_word_embeddings", True),
        biases=True,
    )


def json(config: ModelConfig) -> Json:
    """Their configuration."""
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "vocab_size": config.vocabulary,
        "n_layer": config.layers,
        "hidden_size": config.width,
        "n_head": config.heads,
        "seq_length": config.length,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "apply_residual_connection_post_layernorm": False,
    }


FAMILY = Family(
    config,
    json,
    (
        Tensor("transformer.word_embeddings.weight", ("embedding",), "vocabulary width"),
        *norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *norm(_LAYER + "input_layernorm", "layers.attention_norm"),
        *fused(
            _LAYER + "self_attention.query_key_value", "(head part head_width) width", "(head part head_width)"
        ),
        *linear(_LAYER + "self_attention.dense", "layers.attention.output", "width (head head_width)", "width"),
        *norm(_LAYER + "post_attention_layernorm", "layers.feed_forward_norm"),
        *linear(_LAYER + "mlp.dense_h_to_4h", "layers.feed_forward.into", "hidden width", "hidden"),
        *linear(_LAYER + "mlp.dense_4h_to_h", "layers.feed_forward.out", "width hidden", "width"),
        *norm("transformer.ln_f", "final_norm"),
        Tensor("lm_head.weight", ("unembedding",), "vocabulary width"),
    ),
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
)
