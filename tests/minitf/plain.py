"""A transformer written plainly, without a walk: what the model's compiled cost is compared with."""

import jax
import jax.numpy as jnp


def norm(x, weights, kind, epsilon=1e-5):
    if kind == "layer":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    out = x / jnp.sqrt(jnp.mean(x * x, axis=-1) + epsilon)[:, None] * weights.gain
    return out if weights.offset is None else out + weights.offset


def linear(rows, weight, bias=None):
    out = rows @ weight
    return out if bias is None else out + bias


def layer(stream, weights, config, batch):
    """One pre- or post-norm layer over rows, ``[batch * position, width]``."""
    attention, feed = weights.attention, weights.feed_forward
    rows, width = stream.shape
    length, heads, head_width = rows // batch, config.heads, config.head_size
    x = norm(stream, weights.attention_norm, config.norm) if config.pre_norm else stream

    def project(weight, bias):
        bias = None if bias is None else bias.reshape(-1)
        return linear(x, weight.reshape(width, -1), bias).reshape(batch, length, heads, head_width)

    q = project(attention.query, attention.query_bias)
    k = project(attention.key, attention.key_bias)
    v = project(attention.value, attention.value_bias)
    scores = jnp.einsum("bqhc,bkhc->bhqk", q * head_width**-0.5, k)
    if config.causal:
        past = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
        scores = jnp.where(past, scores, -jnp.inf)
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    pattern = weight / jnp.sum(weight, axis=-1, keepdims=True)
    z = jnp.einsum("bhqk,bkhc->bqhc", pattern, v).reshape(rows, heads * head_width)
    stream = stream + linear(z, attention.output.reshape(-1, width), attention.output_bias)
    if config.post_norm:
        stream = norm(stream, weights.attention_norm, config.norm)
    x = norm(stream, weights.feed_forward_norm, config.norm) if config.pre_norm else stream
    hidden = jax.nn.relu(linear(x, feed.into, feed.into_bias))
    stream = stream + linear(hidden, feed.out, feed.out_bias)
    return norm(stream, weights.feed_forward_norm, config.norm) if config.post_norm else stream


def logits(parameters, tokens, config, unroll=1):
    """The logits alone, ``[batch, position, vocabulary]``."""
    batch, length = tokens.shape
    start = parameters.embedding[tokens.reshape(-1)].reshape(batch, length, -1)
    start = (start + parameters.position[:length]).reshape(batch * length, -1)
    end, _ = jax.lax.scan(
        lambda x, weights: (layer(x, weights, config, batch), None), start, parameters.layers, unroll=unroll
    )
    context = norm(end, parameters.final_norm, config.norm) if config.pre_norm else end
    table = parameters.embedding.T if config.tied else parameters.unembedding
    return linear(context, table, parameters.unembedding_bias).reshape(batch, length, -1)
