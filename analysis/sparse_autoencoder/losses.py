"""The losses of sparse autoencoders, which the module ``autoencoder`` states for each kind."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from minitf.analysis.sparse_autoencoder.activations import Latents, above, keep_largest
from minitf.analysis.sparse_autoencoder.autoencoder import (
    AutoencoderConfig,
    Rows,
    SparseAutoencoder,
    activate,
    lengths,
    pre_activations,
)
from minitf.walk import Leaf, leaf


@struct.dataclass
class Losses:
    """The parts of the loss, weighted; ``total`` is their sum. ``l0`` is the mean number of active latents."""

    reconstruction: Leaf = leaf("")
    sparsity: Leaf = leaf("")
    auxiliary: Leaf = leaf("")
    l0: Leaf = leaf("")

    @property
    def total(self) -> Float[Array, ""]:
        """What training lowers."""
        return self.reconstruction + self.sparsity + self.auxiliary


def losses(
    autoencoder: SparseAutoencoder,
    inputs: Rows,
    config: AutoencoderConfig,
    dead: Bool[Array, " latent"] | None = None,
) -> tuple[Losses, Bool[Array, " latent"]]:
    """The loss on normalized inputs, in its parts, and which latents were active in any row.

    Args:
        dead: latents that the auxiliary loss may use; none by default.
    """
    pre = pre_activations(autoencoder, inputs)
    latents = activate(pre, autoencoder, config)
    left = inputs - latents @ autoencoder.decoder - autoencoder.decoder_bias
    nothing = jnp.zeros((), inputs.dtype)
    penalty, auxiliary = nothing, nothing
    if config.kind == "relu":
        penalty = jnp.mean(latents @ lengths(autoencoder.decoder))
    if config.kind == "jumprelu":
        over = above(pre, jnp.exp(autoencoder.log_threshold), config.bandwidth)
        penalty = jnp.mean(jnp.sum(over, axis=-1))
    if config.auxiliary_k and dead is not None:
        auxiliary = auxiliary_loss(autoencoder, pre, left, dead, config.auxiliary_k)
    active = latents > 0
    parts = Losses(
        reconstruction=jnp.mean(jnp.sum(left * left, axis=-1)),
        sparsity=config.sparsity * penalty,
        auxiliary=config.auxiliary_weight * auxiliary,
        l0=jnp.mean(jnp.sum(active, axis=-1).astype(inputs.dtype)),
    )
    return parts, jnp.any(active, axis=0)


def auxiliary_loss(
    autoencoder: SparseAutoencoder, pre: Latents, left: Rows, dead: Bool[Array, " latent"], k: int
) -> Float[Array, ""]:
    """How badly the k largest dead latents explain the error that the live ones left (Gao et al. 2024).

    The error is a constant here: it is the dead that are to follow it. Zero where no latent is dead.
    """
    revived = keep_largest(jnp.where(dead, jax.nn.relu(pre), 0.0), k) @ autoencoder.decoder
    missed = jax.lax.stop_gradient(left) - revived
    return jnp.where(jnp.any(dead), jnp.mean(jnp.sum(missed * missed, axis=-1)), 0.0)
