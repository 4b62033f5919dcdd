"""The token-table model on counts: Scan and Snap's one-layer transformer without its positions.

Nothing in that model depends on where a token stands, so a sequence is exactly its last token (the query) and
how often every other token occurs. The same filters and aggregates as in :mod:`minitf.model` run on that, with
keys that are vocabulary entries of a given multiplicity instead of positions, and return the same walk.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minitf import aggregate, filter
from minitf.config import ModelConfig, token_tables
from minitf.parameters import Parameters
from minitf.walk import LayerWalk, Walk


def count_walk(parameters: Parameters, queries: Int[Array, " batch"], counts: Float[Array, "batch token"]) -> Walk:
    """The walk of the last position, from token counts (Tian et al. 2023, section 2).

    Args:
        parameters: of a ``token_tables(vocabulary)`` model with one head.
        queries: the last token of each sequence.
        counts: how often each of the first ``token`` entries of the vocabulary occurs before it; tokens beyond
            never occur. Any non-negative reals: the probabilities P(l | n) give the limit of infinite length,
            where the pattern is the paper's c_n (Lemma 2).

    Returns:
        A walk with one layer, one position (the query) and one head, whose key axis is the vocabulary's first
        ``token`` entries: ``layers.scores`` and ``layers.pattern`` are ``[1, batch, 1, 1, token]``.
    """
    table, decoder = parameters.layers.attention.table[0, 0], parameters.unembedding
    tokens, vocabulary = counts.shape[-1], decoder.shape[0]
    scores = table[queries, :tokens]
    pattern = aggregate.associate(scores[:, None, :], counts[:, None, :].astype(scores.dtype))[:, 0, :]
    # The values are one-hot token vectors, so mixing them under the pattern gives the pattern itself.
    scale = filter.norm_scale(pattern, "l2", 0.0)
    normalized = filter.normalize(pattern, scale)
    logits = filter.unembed(normalized, decoder[:tokens])

    def full(rows: Float[Array, "batch token"]) -> Float[Array, "batch width"]:
        return jnp.pad(rows, ((0, 0), (0, vocabulary - tokens)))

    start = jnp.zeros((queries.shape[0], vocabulary), scores.dtype).at[jnp.arange(len(queries)), queries].set(1)
    step, end = full(pattern), full(normalized)
    layer = LayerWalk(
        resid_pre=start[:, None],
        q=table[queries][:, None, None],
        k=jnp.eye(tokens, vocabulary, dtype=scores.dtype)[None, :, None],
        v=jnp.eye(tokens, vocabulary, dtype=scores.dtype)[None, :, None],
        scores=scores[:, None, None],
        pattern=pattern[:, None, None],
        z=step[:, None, None],
        head_steps=step[:, None, None],
        attention_step=step[:, None],
        attention_norm_scale=scale[:, None],
        resid_mid=end[:, None],
        resid_post=end[:, None],
    )
    return Walk(
        token_embedding=start[:, None],
        start=start[:, None],
        layers=LayerWalk(**{name: None if x is None else x[None] for name, x in vars(layer).items()}),
        end=end[:, None],
        context=end[:, None],
        logits=logits[:, None],
    )


__all__ = ["ModelConfig", "count_walk", "token_tables"]
