"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): parallel sub-layers, partly rotary heads."""

from minitf.config import ModelConfig
from minitf.families import rotary, settings
from minitf.families.mapping import Family, Json, Tensor, fused, linear, norm

_LAYER = "gpt_neox.layers.{}."


def config(json: Json) -> ModelConfig:
    """Our configuration. Raises ValueError on what minitf cannot express."""
    settings.only(json, {"attention_bias": True}, "either all maps of a layer have biases or none")
    return ModelConfig(
        vocabulary=settings.whole(json, "vocab_size"),
        layers=settings.whole(json, "num_hidden_layers"),
        width=settings.whole(json, "hidden_size"),
        heads=settings.whole(json, "num_attention_heads"),
        length=settings.whole(json, "max_position_embeddings"),
        hidden=settings.whole(json, "intermediate_size"),
        position="rotary",
        parallel=settings.flag(json, "use_parallel_residual", True),
        feed_forward=settings.activation(json, "hidden_act", "gelu"),
        norm_epsilon=settings.number(json, "layer_norm_eps", 1e-5),
        tied=settings.flag(json, "tie_word_embeddings", False),
        biases=True,
        **rotary.read(json, "rotary_emb_base", "rotary_pct", 0.25),
    )


def json(config: ModelConfig) -> Json:
    """Their configuration."""
    return {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.length,
        "intermediate_size": config.hidden_size,
        "use_parallel_residual": config.parallel,
        "hidden_act": settings.written(config.feed_forward),
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "attention_bias": True,
        **rotary.written(config, "rotary_emb_base", "rotary_pct"),
    }


FAMILY = Family(
    config,
    json,
    (
        Tensor("gpt_neox.embed_in.weight", ("embedding",), "vocabulary width"),
        *norm(_LAYER + "input_layernorm", "layers.attention_norm"),
        *fused(_LAYER + "attention.query_key_value", "(head part head_width) width", "(head part head_width)"),
        *linear(_LAYER + "attention.dense", "layers.attention.output", "width (head head_width)", "width"),
        *norm(_LAYER + "post_attention_layernorm", "layers.feed_forward_norm"),
        *linear(_LAYER + "mlp.dense_h_to_4h", "layers.feed_forward.into", "hidden width", "hidden"),
        *linear(_LAYER + "mlp.dense_4h_to_h", "layers.feed_forward.out", "width hidden", "width"),
        *norm("gpt_neox.final_layer_norm", "final_norm"),
        Tensor("embed_out.weight", ("unembedding",), "vocabulary width"),
    ),
    prefix="gpt_neox.",
    # The causal mask and the rotary angles, kept as buffers by older versions; both follow from the configuration.
    ignorable=(
        r"gpt_neox\.layers\.(?P<layer>\d+)\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"gpt_neox\.rotary_emb\.inv_freq",
    ),
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    renamed=((r"^lm_head\.weight$", "embed_out.weight"),),
)
