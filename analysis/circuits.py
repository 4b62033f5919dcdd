"""Circuits of the weights alone: what each head moves (OV), looks for (QK), and how heads compose.

Elhage et al. 2021, "A mathematical framework for transformer circuits". Rows are vectors: a head reads ``x``,
writes ``x W_V W_O``, and scores a query against a key by ``x_q W_Q W_K^T x_k^T`` (without the factor
``head_width ** -0.5`` and, in rotary models, at distance zero; where queries and keys are normed, before that).
The width x width products are never formed: all is done on their factors.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from minitf.analysis.given import stacked_attention
from minitf.analysis.lens import output_vectors
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype
from minitf.parameters import AttentionParameters, Parameters


class Factors(NamedTuple):
    """A matrix of low rank as ``left @ right``."""

    left: Float[Array, "*heads width rank"]
    right: Float[Array, "*heads rank width"]


class Decomposition(NamedTuple):
    """``u @ diag(s) @ vt``, with orthonormal columns of ``u`` and rows of ``vt``, ``s`` falling."""

    u: Float[Array, "*heads width rank"]
    s: Float[Array, "*heads rank"]
    vt: Float[Array, "*heads rank width"]


def ov(parameters: Parameters, config: ModelConfig, *, fold_norm: bool = False) -> Factors:
    """Every head's ``W_V W_O``, ``[layer, head, width, width]`` in factors.

    Args:
        fold_norm: multiply what reads the stream with the gain of the norm before it. The norm's centering and its
            offset are left out in any case.

    Raises:
        ValueError: attention by a free table has no such factors, or there is no norm to fold.
    """
    attention = _attention(parameters, config)
    value = _by_head(attention.value, config) * _gain(parameters, config, fold_norm)
    return Factors(value, in_statistics_dtype(attention.output))


def qk(parameters: Parameters, config: ModelConfig, *, fold_norm: bool = False) -> Factors:
    """Every head's ``W_Q W_K^T``, ``[layer, head, width, width]`` in factors; otherwise as :func:`ov`."""
    attention = _attention(parameters, config)
    gain = _gain(parameters, config, fold_norm)
    query, key = _by_head(attention.query, config) * gain, _by_head(attention.key, config) * gain
    return Factors(query, jnp.swapaxes(key, -1, -2))


def decompose(factors: Factors) -> Decomposition:
    """The singular value decomposition of ``left @ right``: two QR decompositions and a small SVD.

    What a head senses most is the first column of OV's ``u``, what it then writes the first row of ``vt``.
    """
    senses, inner_left = jnp.linalg.qr(factors.left)
    writes, inner_right = jnp.linalg.qr(jnp.swapaxes(factors.right, -1, -2))
    u, s, vt = jnp.linalg.svd(inner_left @ jnp.swapaxes(inner_right, -1, -2), full_matrices=False)
    return Decomposition(senses @ u, s, vt @ jnp.swapaxes(writes, -1, -2))


def effective_rank(s: Float[Array, "*heads rank"]) -> Float[Array, "*heads"]:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli 2007); 0 for zeros."""
    total = jnp.sum(s, axis=-1, keepdims=True)
    share = s / jnp.where(total == 0, 1.0, total)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), axis=-1)
    return jnp.where(total[..., 0] == 0, 0.0, jnp.exp(entropy))


def eigenvalues(factors: Factors) -> Complex[Array, "*heads rank"]:
    """The eigenvalues of ``left @ right`` that need not be zero: those of the small ``right @ left``.

    JAX computes eigenvalues of unsymmetric matrices on the CPU.
    """
    return jnp.linalg.eigvals(factors.right @ factors.left)


def copying_score(
    parameters: Parameters, config: ModelConfig, *, fold_norm: bool = False
) -> Float[Array, "layer head"]:
    """``sum(eigenvalues) / sum |eigenvalues|`` of every head's map from tokens to logits, ``E W_V W_O W_U``.

    1 where reading a token raises that token's logit, -1 where it lowers it. The eigenvalues of the vocabulary x
    vocabulary matrix are those of ``W_O W_U E W_V``. ``fold_norm`` folds the gains of the attention's and of the
    final norm; raises as :func:`ov`.
    """
    factors = ov(parameters, config, fold_norm=fold_norm)
    out = in_statistics_dtype(output_vectors(parameters, config))
    if fold_norm:
        out = out * parameters.final_norm.gain[:, None]
    embedding = None if parameters.embedding is None else in_statistics_dtype(parameters.embedding)

    def score(head: Factors) -> Float[Array, ""]:
        reads = head.left if embedding is None else embedding @ head.left
        values = jnp.linalg.eigvals((head.right @ out) @ reads)
        size = jnp.sum(jnp.abs(values))
        return jnp.sum(values.real) / jnp.where(size == 0, 1.0, size)

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), factors)
    return jax.lax.map(score, flat).reshape(config.layers, config.heads)


def composition(
    parameters: Parameters, config: ModelConfig, kind: str, *, fold_norm: bool = False
) -> Float[Array, "layer head later_layer later_head"]:
    """How much each later head's queries, keys or values read what each earlier head writes.

    ``|L R| / (|L| |R|)`` in Frobenius norms, L the earlier head's OV, R the later head's QK (kind "q"), its
    transpose ("k") or OV ("v"); 0 for heads that do not come later. Compare with :func:`random_composition`.
    Raises ValueError for another kind, and as :func:`ov`.
    """
    if kind not in ("q", "k", "v"):
        raise ValueError(f"heads compose through q, k or v, not {kind!r}")
    earlier = ov(parameters, config, fold_norm=fold_norm)
    later = (
        ov(parameters, config, fold_norm=fold_norm) if kind == "v" else qk(parameters, config, fold_norm=fold_norm)
    )
    if kind == "k":
        later = Factors(*(jnp.swapaxes(x, -1, -2) for x in (later.right, later.left)))
    earlier, later = (jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), f) for f in (earlier, later))
    # Orthonormal factors leave the norm as it is; what is inside is rank x width, and width x rank.
    written = jnp.linalg.qr(earlier.left, mode="r") @ earlier.right
    read = later.left @ jnp.swapaxes(jnp.linalg.qr(jnp.swapaxes(later.right, -1, -2), mode="r"), -1, -2)
    size = lambda x: jnp.linalg.norm(x, axis=(-2, -1))
    both = jax.lax.map(lambda one: size(one @ read), written)
    sizes = size(written)[:, None] * size(read)[None, :]
    shares = both / jnp.where(sizes == 0, 1.0, sizes)
    layer = jnp.arange(config.layers)
    after = (layer[:, None] < layer[None, :])[:, None, :, None]
    return jnp.where(after, shares.reshape(config.layers, config.heads, config.layers, config.heads), 0.0)


def random_composition(config: ModelConfig) -> float:
    """The composition of heads whose directions are drawn at random, ``width ** -0.5`` (root mean square).

    With R turned by a rotation drawn uniformly, the mean of ``|L R|^2`` is exactly ``|L|^2 |R|^2 / width``.
    """
    return float(config.width**-0.5)


def _attention(parameters: Parameters, config: ModelConfig) -> AttentionParameters:
    if config.attention == "table":
        raise ValueError("attention by a free table has no query, key, value and output weights to decompose")
    return stacked_attention(parameters, "circuits")


def _by_head(weight: Float[Array, "layer width group head_width"], config: ModelConfig) -> Array:
    """``[layer, head, width, head_width]``, keys and values repeated for the heads that share them."""
    moved = jnp.moveaxis(in_statistics_dtype(weight), 2, 1)
    return jnp.repeat(moved, config.heads // weight.shape[2], axis=1)


def _gain(parameters: Parameters, config: ModelConfig, fold_norm: bool) -> Array | float:
    if not fold_norm:
        return 1.0
    gain = parameters.layers.attention_norm.gain
    if not config.pre_norm or gain is None:
        raise ValueError(
            f"no norm with a gain stands before the attention (norm={config.norm!r}, "
            f"norm_placement={config.norm_placement!r}), so there is none to fold"
        )
    return gain[:, None, :, None]
