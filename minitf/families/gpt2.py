"""GPT-2 (Radford et al. 2019): learned positions, norms before the sub-layers, maps with the inputs first."""

from minitf.config import ModelConfig
from minitf.families import settings
from minitf.families.mapping import Family, Json, Tensor, fused, linear, norm

_LAYER = "transformer.h.{}."


def config(json: Json) -> ModelConfig:
    """Our configuration. Raises ValueError on what minitf cannot express."""
    settings.only(json, {"scale_attn_weights": True}, "scores are divided by the root of the head's width")
    settings.only(json, {"scale_attn_by_inverse_layer_idx": False}, "scores are scaled alike in every layer")
    settings.only(json, {"add_cross_attention": False}, "there is only self-attention")
    return ModelConfig(
        vocabulary=settings.whole(json, "vocab_size"),
        layers=settings.whole(json, "n_layer"),
        width=settings.whole(json, "n_embd"),
        heads=settings.whole(json, "n_head"),
        length=settings.whole(json, "n_positions"),
        hidden=settings.whole(json, "n_inner", 4 * settings.whole(json, "n_embd")),
        feed_forward=settings.activation(json, "activation_function", "gelu_new"),
        norm_epsilon=settings.number(json, "layer_norm_epsilon", 1e-5),
        tied=settings.flag(json, "tie_word_embeddings", True),
        biases=True,
    )


def json(config: ModelConfig) -> Json:
    """Their configuration."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocabulary,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_positions": config.length,
        "n_inner": config.hidden_size,
        "activation_function": settings.written(config.feed_forward),
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
    }


FAMILY = Family(
    config,
    json,
    (
        Tensor("transformer.wte.weight", ("embedding",), "vocabulary width"),
        Tensor("transformer.wpe.weight", ("position",), "position width"),
        *norm(_LAYER + "ln_1", "layers.attention_norm"),
        *fused(_LAYER + "attn.c_attn", "width (part head head_width)", "(part head head_width)"),
        *linear(_LAYER + "attn.c_proj", "layers.attention.output", "(head head_width) width", "width"),
        *norm(_LAYER + "ln_2", "layers.feed_forward_norm"),
        *linear(_LAYER + "mlp.c_fc", "layers.feed_forward.into", "width hidden", "hidden"),
        *linear(_LAYER + "mlp.c_proj", "layers.feed_forward.out", "hidden width", "width"),
        *norm("transformer.ln_f", "final_norm"),
        Tensor("lm_head.weight", ("unembedding",), "vocabulary width"),
    ),
    prefix="transformer.",
    # The causal mask, kept as a buffer by older versions.
    ignorable=(r"transformer\.h\.(?P<layer>\d+)\.attn\.(bias|masked_bias)",),
    copies={"lm_head.weight": "transformer.wte.weight"},
)
