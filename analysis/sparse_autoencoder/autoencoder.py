"""The sparse autoencoder ``f = act((x - b_dec) W_enc + b_enc)``, ``x_hat = f W_dec + b_dec``: three kinds.

Their losses are means over rows. ``x`` is normalized: the mean squared length of the data is 1, as in
Rajamanoharan et al. 2024, so that a reconstruction by zeros has the loss 1, and weights mean the same everywhere.

- ``relu`` (Bricken et al. 2023): ``|x - x_hat|^2 + sparsity * sum_i f_i |W_dec,i|``. The penalty counts the
  length of a decoder row, so rows are free: a longer row with a smaller activation gains nothing.
- ``topk`` (Gao et al. 2024, arXiv 2406.04093): the k largest of the positive pre-activations; the loss is
  ``|x - x_hat|^2``, and the auxiliary loss for dead latents. Rows have length 1.
- ``jumprelu`` (Rajamanoharan et al. 2024, arXiv 2407.14435): ``f = z 1[z > theta]``,
  ``|x - x_hat|^2 + sparsity * sum_i 1[z_i > theta_i]``, straight-through slopes for theta. Rows have length 1.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Key

from minitf.analysis.sparse_autoencoder.activations import Latents, jump_relu, keep_largest
from minitf.filter import in_statistics_dtype
from minitf.walk import Leaf, leaf

Kind = Literal["relu", "topk", "jumprelu"]
Rows = Float[Array, "row width"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an autoencoder is and what it is trained for.

    Attributes:
        width: of the vectors.
        latents: how many directions.
        kind: see the module.
        sparsity: weight of the penalty (``relu``: of the L1 norm; ``jumprelu``: of L0), the lambda of the papers.
        k: most latents active at once (``topk``).
        auxiliary_k: dead latents that explain the error left (``topk``); 0 for no auxiliary loss.
        auxiliary_weight: of that loss, the alpha of Gao et al.
        dead_after: rows without activity after which a latent counts as dead; Gao et al. take ten million.
        threshold: theta at the start (``jumprelu``).
        bandwidth: width of the kernel, the epsilon of the paper, which takes .001 with batches of 4096
            (``jumprelu``). Only pre-activations within half of it around theta move theta, so smaller batches
            want a wider one.

    Raises:
        ValueError: a number that no autoencoder can have, or a ``sparsity`` or ``k`` that its kind does not use.
    """

    width: int
    latents: int
    kind: Kind = "relu"
    sparsity: float = 0.0
    k: int = 0
    auxiliary_k: int = 0
    auxiliary_weight: float = 1 / 32
    dead_after: int = 10_000_000
    threshold: float = 0.001
    bandwidth: float = 0.001

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(get_args(Kind))}")
        for name in ("width", "latents", "dead_after"):
            if not _is_whole(getattr(self, name), 1):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number of at least 1")
        for name in ("sparsity", "auxiliary_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number of at least 0")
        for name in ("threshold", "bandwidth"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number above 0")
        if self.kind == "topk":
            if not _is_whole(self.k, 1) or self.k > self.latents:
                raise ValueError(f"k is {self.k!r}; topk keeps 1 to {self.latents} of its {self.latents} latents")
            if not _is_whole(self.auxiliary_k, 0) or self.auxiliary_k > self.latents:
                raise ValueError(f"auxiliary_k is {self.auxiliary_k!r}; it must be 0 to {self.latents}")
            if self.sparsity:
                raise ValueError(f"sparsity is {self.sparsity}, but topk has no penalty: k says how sparse it is")
        elif self.k or self.auxiliary_k:
            raise ValueError(
                f"k is {self.k} and auxiliary_k is {self.auxiliary_k}, but they are for topk alone; {self.kind} "
                "is as sparse as sparsity makes it"
            )

    @property
    def unit_rows(self) -> bool:
        """Whether the rows of the decoder are kept at length 1."""
        return self.kind != "relu"


@struct.dataclass
class SparseAutoencoder:
    """``decoder`` row i is the direction of latent i; ``scale`` is what inputs are multiplied by, not trained.

    Weights and activations are those of the normalized inputs. ``log_threshold`` is there in ``jumprelu`` alone.
    """

    encoder: Leaf = leaf("width latent")
    encoder_bias: Leaf = leaf("latent")
    decoder: Leaf = leaf("latent width")
    decoder_bias: Leaf = leaf("width")
    log_threshold: Leaf = leaf("latent")
    scale: Leaf = leaf("")


def initialize(config: AutoencoderConfig, key: Key[Array, ""], rows: Rows) -> SparseAutoencoder:
    """Random decoder rows of length 1, the encoder their transpose, decoder_bias the data's geometric median.

    Args:
        rows: a sample of the data, a batch or more: it sets scale and bias.

    Raises:
        ValueError: rows of another width, that are not finite, or that are all zero.
    """
    check_rows(rows, config)
    rows = in_statistics_dtype(rows)
    square = jnp.mean(jnp.sum(rows * rows, axis=-1))
    if not 0 < float(square) < math.inf:
        raise ValueError(f"the mean squared length of the rows is {float(square)}; it must be finite and above 0")
    scale = 1 / jnp.sqrt(square)
    directions = unit(jax.random.normal(key, (config.latents, config.width), rows.dtype))
    return SparseAutoencoder(
        encoder=directions.T,
        encoder_bias=jnp.zeros(config.latents, rows.dtype),
        decoder=directions,
        decoder_bias=geometric_median(rows * scale),
        log_threshold=jnp.full(config.latents, math.log(config.threshold), rows.dtype)
        if config.kind == "jumprelu"
        else None,
        scale=scale,
    )


def encode(autoencoder: SparseAutoencoder, rows: Rows, config: AutoencoderConfig) -> Latents:
    """The activations of rows of the data."""
    return activate(pre_activations(autoencoder, normalized(autoencoder, rows)), autoencoder, config)


def decode(autoencoder: SparseAutoencoder, latents: Latents) -> Rows:
    """Rows of the data, from activations."""
    return (latents @ autoencoder.decoder + autoencoder.decoder_bias) / autoencoder.scale


def reconstruct(autoencoder: SparseAutoencoder, rows: Rows, config: AutoencoderConfig) -> Rows:
    """Rows, encoded and decoded."""
    return decode(autoencoder, encode(autoencoder, rows, config))


def normalized(autoencoder: SparseAutoencoder, rows: Rows) -> Rows:
    """Rows as the autoencoder sees them: in at least float32, with a mean squared length of about 1."""
    return in_statistics_dtype(rows) * autoencoder.scale


def pre_activations(autoencoder: SparseAutoencoder, inputs: Rows) -> Latents:
    """``(x - b_dec) W_enc + b_enc`` of normalized inputs."""
    return (inputs - autoencoder.decoder_bias) @ autoencoder.encoder + autoencoder.encoder_bias


def activate(pre: Latents, autoencoder: SparseAutoencoder, config: AutoencoderConfig) -> Latents:
    """Activations from pre-activations; never negative."""
    if config.kind == "jumprelu":
        return jump_relu(pre, jnp.exp(autoencoder.log_threshold), config.bandwidth)
    return jax.nn.relu(pre) if config.kind == "relu" else keep_largest(jax.nn.relu(pre), config.k)


def lengths(directions: Float[Array, "latent width"]) -> Float[Array, " latent"]:
    """The length of each row; that of a row of zeros has the slope 0, not none."""
    square = jnp.sum(directions * directions, axis=-1)
    return jnp.where(square == 0, 0.0, jnp.sqrt(jnp.where(square == 0, 1.0, square)))


def unit(directions: Float[Array, "latent width"]) -> Float[Array, "latent width"]:
    """The rows at length 1; a row of zeros stays."""
    length = lengths(directions)[:, None]
    return directions / jnp.where(length == 0, 1.0, length)


def geometric_median(rows: Rows, steps: int = 100) -> Float[Array, " width"]:
    """The point with the least mean distance to the rows, by Weiszfeld's iteration from their mean.

    Unlike the mean it hardly moves for the few vectors, hundreds of times longer than others, of real models.
    """

    def nearer(_: Array, point: Array) -> Array:
        distance = jnp.linalg.norm(rows - point, axis=-1)
        # A row at the point itself would weigh infinitely much.
        weight = 1 / jnp.maximum(distance, 1e-6 * jnp.mean(distance) + jnp.finfo(rows.dtype).tiny)
        return weight @ rows / jnp.sum(weight)

    return jax.lax.fori_loop(0, steps, nearer, jnp.mean(rows, axis=0))


def check_rows(rows: Array, config: AutoencoderConfig) -> None:
    """Refuse rows that are not ``[row, width]`` of numbers."""
    if rows.ndim != 2 or rows.shape[1] != config.width or not len(rows):
        raise ValueError(f"the rows have shape {rows.shape}; this autoencoder reads [row, {config.width}]")
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"the rows are {rows.dtype}; an autoencoder reads vectors of floating-point numbers")


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
