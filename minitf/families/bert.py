"""BERT (Devlin et al. 2019) with its masked-token head: sees both ways, norms after the sub-layers.

Every token is of the first segment type; the table of types is kept as it is, and its first vector is added to the
positions when the model runs.
"""

from minitf.config import ModelConfig
from minitf.families import settings
from minitf.families.mapping import Family, Json, Tensor, linear, norm, projections

_LAYER = "bert.encoder.layer.{}."
_HEAD = "cls.predictions."


def config(json: Json) -> ModelConfig:
    """Our configuration. Raises ValueError on what minitf cannot express."""
    settings.only(json, {"position_embedding_type": "absolute"}, "positions are added to the tokens")
    settings.only(json, {"is_decoder": False, "add_cross_attention": False}, "this family is an encoder")
    settings.only(json, {"tie_word_embeddings": True}, "the masked-token head reads the embedding")
    architectures = json.get("architectures")
    if architectures and not set(architectures) & {"BertForMaskedLM", "BertForPreTraining"}:
        raise ValueError(
            f"config.json: the architecture is {', '.join(architectures)}, which has no masked-token head; minitf "
            "reads BertForMaskedLM and BertForPreTraining"
        )
    return ModelConfig(
        vocabulary=settings.whole(json, "vocab_size"),
        layers=settings.whole(json, "num_hidden_layers"),
        width=settings.whole(json, "hidden_size"),
        heads=settings.whole(json, "num_attention_heads"),
        length=settings.whole(json, "max_position_embeddings"),
        hidden=settings.whole(json, "intermediate_size"),
        token_types=settings.whole(json, "type_vocab_size", 2),
        feed_forward=settings.activation(json, "hidden_act", "gelu"),
        norm_epsilon=settings.number(json, "layer_norm_eps", 1e-12),
        causal=False,
        norm_placement="post",
        embedding_norm=True,
        biases=True,
        tied=True,
        unembedding_bias=True,
        unembedding_transform=True,
    )


def json(config: ModelConfig) -> Json:
    """Their configuration."""
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": config.vocabulary,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.length,
        "intermediate_size": config.hidden_size,
        "type_vocab_size": config.token_types,
        "hidden_act": settings.written(config.feed_forward),
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": True,
    }


FAMILY = Family(
    config,
    json,
    (
        Tensor("bert.embeddings.word_embeddings.weight", ("embedding",), "vocabulary width"),
        Tensor("bert.embeddings.position_embeddings.weight", ("position",), "position width"),
        Tensor("bert.embeddings.token_type_embeddings.weight", ("token_type",), "token_type width"),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *projections(_LAYER + "attention.self.", ("query", "key", "value")),
        *linear(_LAYER + "attention.output.dense", "layers.attention.output", "width (head head_width)", "width"),
        *norm(_LAYER + "attention.output.LayerNorm", "layers.attention_norm"),
        *linear(_LAYER + "intermediate.dense", "layers.feed_forward.into", "hidden width", "hidden"),
        *linear(_LAYER + "output.dense", "layers.feed_forward.out", "width hidden", "width"),
        *norm(_LAYER + "output.LayerNorm", "layers.feed_forward_norm"),
        Tensor(_HEAD + "transform.dense.weight", ("unembedding_transform.weight",), "output_width width"),
        Tensor(_HEAD + "transform.dense.bias", ("unembedding_transform.bias",), "output_width"),
        *norm(_HEAD + "transform.LayerNorm", "unembedding_transform.norm", "output_width"),
        Tensor(_HEAD + "bias", ("unembedding_bias",), "vocabulary"),
    ),
    prefix="bert.",
    # The pooler and the next-sentence head belong to another task and have no part in the logits of tokens.
    ignorable=(
        r"bert\.pooler\.dense\.(weight|bias)",
        r"cls\.seq_relationship\.(weight|bias)",
        r"bert\.embeddings\.position_ids",
    ),
    copies={
        _HEAD + "decoder.weight": "bert.embeddings.word_embeddings.weight",
        _HEAD + "decoder.bias": _HEAD + "bias",
    },
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
