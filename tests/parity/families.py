"""The peers: how each is built and run, and under which names minitf knows its weights."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import transformers
from parity.post_norm_encoder import PostNormEncoder, caught
from torch import nn
from transformers.models.bert import modeling_bert
from transformers.models.bloom import modeling_bloom
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from minitf import ModelConfig

VOCABULARY, LAYERS, LENGTH, WIDTH, HIDDEN = 50, 2, 16, 16, 24
SIZES = {"vocabulary": VOCABULARY, "layers": LAYERS, "length": LENGTH, "width": WIDTH, "hidden": HIDDEN}

# minitf's name -> the peer's name, {} for the layer, and what turns the peer's array into minitf's.
Table = dict[str, tuple[str, Callable[..., np.ndarray]]]


@dataclass(frozen=True)
class Family:
    """One peer. ``run`` gives its output (logits or last hidden state) and leaves by the walk's names."""

    config: ModelConfig
    module: ModuleType
    build: Callable[[], nn.Module]
    run: Callable[..., dict[str, torch.Tensor]]
    table: Table
    output: str = "logits"  # the leaf that the peer's output is

    def weights(self, peer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The peer's weights (or their gradients) by minitf's names."""

        def read(names, to):
            if "{}" not in names:
                return to(*(peer[name] for name in names.split("+")))
            return np.stack([to(peer[names.format(layer)]) for layer in range(LAYERS)])

        return {ours: read(*theirs) for ours, theirs in self.table.items()}


def same(x):
    return x


def transposed(x):
    return x.T


def norm(ours: str, theirs: str, offset: bool = True) -> Table:
    table: Table = {f"{ours}.gain": (f"{theirs}.weight", same)}
    return table | ({f"{ours}.offset": (f"{theirs}.bias", same)} if offset else {})


def linear(ours: str, theirs: str, to=transposed, biases: bool = True) -> Table:
    table: Table = {ours: (f"{theirs}.weight", to)}
    return table | ({f"{ours}_bias": (f"{theirs}.bias", same)} if biases else {})


def projections(
    theirs: str, parts: tuple[str, str, str], heads: tuple[int, int, int], biases: str | None = "bias"
) -> Table:
    """Queries, keys and values, each a ``nn.Linear`` (outputs first) of its own.

    ``biases="zeros"`` fills in zeros where minitf has biases and the peer has none.
    """
    table: Table = {}
    for ours, part, count in zip(("query", "key", "value"), parts, heads, strict=True):
        name = theirs.format("{}", part)
        table[f"layers.attention.{ours}"] = (f"{name}.weight", lambda w, n=count: w.T.reshape(w.shape[1], n, -1))
        if biases == "bias":
            table[f"layers.attention.{ours}_bias"] = (f"{name}.bias", lambda b, n=count: b.reshape(n, -1))
        if biases == "zeros":
            table[f"layers.attention.{ours}_bias"] = (
                f"{name}.weight",
                lambda w, n=count: np.zeros((n, len(w) // n), w.dtype),
            )
    return table


def fused(theirs: str, heads: int, order: str, outputs_first: bool = True) -> Table:
    """Queries, keys and values in one map, either all queries first ("part") or head by head ("head")."""

    def part(index):
        def take(x):
            x = x.T if outputs_first else x
            if order == "part":
                return x.reshape(*x.shape[:-1], 3, heads, -1)[..., index, :, :]
            return x.reshape(*x.shape[:-1], heads, 3, -1)[..., index, :]

        return take

    table: Table = {}
    for index, ours in enumerate(("query", "key", "value")):
        table[f"layers.attention.{ours}"] = (f"{theirs}weight", part(index))
        table[f"layers.attention.{ours}_bias"] = (f"{theirs}bias", part(index))
    return table


def merged(heads: int, outputs_first: bool = True):
    """The map from all heads to the residual stream, its head and width axes apart."""

    def split(w):
        w = w.T if outputs_first else w
        return w.reshape(heads, -1, w.shape[-1])

    return split


def run_transformers(blocks, middle=None, middle_is_output=False, final=None):
    """Run a model of ``transformers``, catching the residual stream between its sub-layers."""

    def run(model, tokens, valid):
        found: dict = {}
        for block in blocks(model) if middle else ():
            caught(middle(block), found, "layers.resid_mid", middle_is_output)
        if final:
            caught(final(model), found, "end")
        out = model(
            input_ids=tokens,
            attention_mask=valid.long(),
            output_hidden_states=True,
            output_attentions=True,
        )
        leaves = {name: torch.stack(values) for name, values in found.items()}
        if "end" in leaves:
            leaves["end"] = leaves["end"][0]
        return leaves | {
            "output": out.logits if "logits" in out else out.last_hidden_state,
            "layers.resid_pre": torch.stack(out.hidden_states[:-1]),
            "context": out.hidden_states[-1],
            "layers.pattern": torch.stack(out.attentions),
        }

    return run


def eager(model_class, config):
    """A model whose attention is written out, so that it can give its attentions."""
    options = {"attn_implementation": "eager", "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    return lambda: model_class(config(**options)).eval()


def bloom() -> nn.Module:
    """BLOOM with torch's tanh form of GELU: its own rounds sqrt(2 / pi) to eight digits."""
    model = eager(transformers.BloomForCausalLM, bloom_config)()
    for block in model.transformer.h:
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")
    return model


def bloom_config(**options):
    return transformers.BloomConfig(
        vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_head=4,
        hidden_size=WIDTH,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **options,
    )


def gpt2_config(**options):
    return transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_head=4,
        n_embd=WIDTH,
        n_inner=HIDDEN,
        n_positions=LENGTH,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **options,
    )


def gptj_config(**options):
    return transformers.GPTJConfig(
        vocab_size=VOCABULARY,
        n_layer=LAYERS,
        n_head=2,
        n_embd=WIDTH,
        n_inner=HIDDEN,
        n_positions=LENGTH,
        rotary_dim=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **options,
    )


def shared(sizes_heads: int, **options):
    """The settings that Llama, GPT-NeoX and BERT call by the same names."""
    return {
        "vocab_size": VOCABULARY,
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_attention_heads": sizes_heads,
        "max_position_embeddings": LENGTH,
        **options,
    }


def neox_config(**options):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    return transformers.GPTNeoXConfig(
        **shared(2, use_parallel_residual=True, hidden_act="gelu", rope_parameters=rope, **options)
    )


def llama_config(**options):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.LlamaConfig(
        **shared(4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=rope, **options)
    )


def bert_config(**options):
    return transformers.BertConfig(
        **shared(4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    )


FAMILIES = {
    "gpt2": Family(
        ModelConfig(**SIZES, heads=4, tied=True, biases=True),
        modeling_gpt2,
        eager(transformers.GPT2LMHeadModel, gpt2_config),
        run_transformers(lambda m: m.transformer.h, lambda b: b.ln_2, final=lambda m: m.transformer.ln_f),
        {"embedding": ("transformer.wte.weight", same), "position": ("transformer.wpe.weight", same)}
        | norm("layers.attention_norm", "transformer.h.{}.ln_1")
        | fused("transformer.h.{}.attn.c_attn.", 4, "part", outputs_first=False)
        | linear("layers.attention.output", "transformer.h.{}.attn.c_proj", merged(4, outputs_first=False))
        | norm("layers.feed_forward_norm", "transformer.h.{}.ln_2")
        | linear("layers.feed_forward.into", "transformer.h.{}.mlp.c_fc", same)
        | linear("layers.feed_forward.out", "transformer.h.{}.mlp.c_proj", same)
        | norm("final_norm", "transformer.ln_f"),
    ),
    "gpt_neox": Family(
        ModelConfig(
            **SIZES,
            heads=2,
            biases=True,
            position="rotary",
            rotary_fraction=0.25,
            parallel=True,
            feed_forward="gelu",
        ),
        modeling_gpt_neox,
        eager(transformers.GPTNeoXForCausalLM, neox_config),
        run_transformers(lambda m: m.gpt_neox.layers, final=lambda m: m.gpt_neox.final_layer_norm),
        {"embedding": ("gpt_neox.embed_in.weight", same), "unembedding": ("lm_head.weight", transposed)}
        | norm("layers.attention_norm", "gpt_neox.layers.{}.input_layernorm")
        | fused("gpt_neox.layers.{}.attention.query_key_value.", 2, "head")
        | linear("layers.attention.output", "gpt_neox.layers.{}.attention.dense", merged(2))
        | norm("layers.feed_forward_norm", "gpt_neox.layers.{}.post_attention_layernorm")
        | linear("layers.feed_forward.into", "gpt_neox.layers.{}.mlp.dense_h_to_4h")
        | linear("layers.feed_forward.out", "gpt_neox.layers.{}.mlp.dense_4h_to_h")
        | norm("final_norm", "gpt_neox.final_layer_norm"),
    ),
    "gptj": Family(
        ModelConfig(
            **SIZES,
            heads=2,
            biases=True,
            unembedding_bias=True,
            position="rotary",
            rotary_fraction=0.5,
            rotary_interleaved=True,
            parallel=True,
        ),
        modeling_gptj,
        eager(transformers.GPTJForCausalLM, gptj_config),
        run_transformers(lambda m: m.transformer.h, final=lambda m: m.transformer.ln_f),
        {"embedding": ("transformer.wte.weight", same)}
        # One norm serves both halves of a layer.
        | norm("layers.attention_norm", "transformer.h.{}.ln_1")
        | norm("layers.feed_forward_norm", "transformer.h.{}.ln_1")
        | projections("transformer.h.{}.attn.{}_proj", ("q", "k", "v"), (2, 2, 2), biases="zeros")
        | linear("layers.attention.output", "transformer.h.{}.attn.out_proj", merged(2), biases=False)
        | {
            "layers.attention.output_bias": (
                "transformer.h.{}.attn.out_proj.weight",
                lambda w: np.zeros_like(w[:, 0]),
            )
        }
        | linear("layers.feed_forward.into", "transformer.h.{}.mlp.fc_in")
        | linear("layers.feed_forward.out", "transformer.h.{}.mlp.fc_out")
        | norm("final_norm", "transformer.ln_f")
        | linear("unembedding", "lm_head"),
    ),
    "llama": Family(
        ModelConfig(**SIZES, heads=4, key_value_heads=2, position="rotary", norm="rms", feed_forward="swiglu"),
        modeling_llama,
        eager(transformers.LlamaForCausalLM, llama_config),
        run_transformers(
            lambda m: m.model.layers, lambda b: b.post_attention_layernorm, final=lambda m: m.model.norm
        ),
        {"embedding": ("model.embed_tokens.weight", same), "unembedding": ("lm_head.weight", transposed)}
        | norm("layers.attention_norm", "model.layers.{}.input_layernorm", offset=False)
        | projections("model.layers.{}.self_attn.{}_proj", ("q", "k", "v"), (4, 2, 2), biases=None)
        | linear("layers.attention.output", "model.layers.{}.self_attn.o_proj", merged(4), biases=False)
        | norm("layers.feed_forward_norm", "model.layers.{}.post_attention_layernorm", offset=False)
        | linear("layers.feed_forward.into", "model.layers.{}.mlp.gate_proj", biases=False)
        | linear("layers.feed_forward.gate", "model.layers.{}.mlp.up_proj", biases=False)
        | linear("layers.feed_forward.out", "model.layers.{}.mlp.down_proj", biases=False)
        | norm("final_norm", "model.norm", offset=False),
    ),
    "bloom": Family(
        ModelConfig(
            **SIZES | {"hidden": 4 * WIDTH}, heads=4, tied=True, biases=True, position="alibi", embedding_norm=True
        ),
        modeling_bloom,
        bloom,
        run_transformers(
            lambda m: m.transformer.h, lambda b: b.post_attention_layernorm, final=lambda m: m.transformer.ln_f
        ),
        {"embedding": ("transformer.word_embeddings.weight", same)}
        | norm("embedding_norm", "transformer.word_embeddings_layernorm")
        | norm("layers.attention_norm", "transformer.h.{}.input_layernorm")
        | fused("transformer.h.{}.self_attention.query_key_value.", 4, "head")
        | linear("layers.attention.output", "transformer.h.{}.self_attention.dense", merged(4))
        | norm("layers.feed_forward_norm", "transformer.h.{}.post_attention_layernorm")
        | linear("layers.feed_forward.into", "transformer.h.{}.mlp.dense_h_to_4h")
        | linear("layers.feed_forward.out", "transformer.h.{}.mlp.dense_4h_to_h")
        | norm("final_norm", "transformer.ln_f"),
    ),
    "bert": Family(
        ModelConfig(
            **SIZES,
            heads=4,
            tied=True,
            biases=True,
            causal=False,
            norm_placement="post",
            norm_epsilon=1e-12,
            embedding_norm=True,
            feed_forward="gelu",
        ),
        modeling_bert,
        eager(transformers.BertModel, bert_config),
        run_transformers(lambda m: m.encoder.layer, lambda b: b.attention.output, middle_is_output=True),
        {
            "embedding": ("embeddings.word_embeddings.weight", same),
            # Every token here has type 0, so its vector belongs to every position.
            "position": (
                "embeddings.position_embeddings.weight+embeddings.token_type_embeddings.weight",
                lambda position, kind: position + kind[0],
            ),
        }
        | norm("embedding_norm", "embeddings.LayerNorm")
        | projections("encoder.layer.{}.attention.self.{}", ("query", "key", "value"), (4, 4, 4))
        | linear("layers.attention.output", "encoder.layer.{}.attention.output.dense", merged(4))
        | norm("layers.attention_norm", "encoder.layer.{}.attention.output.LayerNorm")
        | linear("layers.feed_forward.into", "encoder.layer.{}.intermediate.dense")
        | linear("layers.feed_forward.out", "encoder.layer.{}.output.dense")
        | norm("layers.feed_forward_norm", "encoder.layer.{}.output.LayerNorm"),
        output="context",
    ),
    "torch_encoder": Family(
        ModelConfig(
            **SIZES,
            heads=4,
            biases=True,
            position="sinusoidal",
            embedding_scale=math.sqrt(WIDTH),
            norm_placement="post",
            feed_forward="relu",
        ),
        ModuleType("nothing"),
        lambda: PostNormEncoder(VOCABULARY, WIDTH, HIDDEN, LAYERS, heads=4),
        lambda model, tokens, valid: model(tokens, valid),
        {"embedding": ("embedding.weight", same), "unembedding": ("head.weight", transposed)}
        | fused("layers.{}.self_attn.in_proj_", 4, "part")
        | linear("layers.attention.output", "layers.{}.self_attn.out_proj", merged(4))
        | norm("layers.attention_norm", "layers.{}.norm1")
        | linear("layers.feed_forward.into", "layers.{}.linear1")
        | linear("layers.feed_forward.out", "layers.{}.linear2")
        | norm("layers.feed_forward_norm", "layers.{}.norm2"),
    ),
}
