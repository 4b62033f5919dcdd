"""Tokens to windows: what the compiled loop reads, a window being `length` inputs and the token after the
last.

Everything here works on one stream of tokens and on the device: in a window of length + 1 tokens,
`window[:-1]` are the inputs and `window[1:]` the targets. `random_batch` needs only a key and the step, so
any step can be replayed.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import tiktoken
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from minitf.tokenizer import encode


def token_stream(
    encoding: tiktoken.Encoding, documents: Iterable[str], separator: str = "\n\n"
) -> Int32[np.ndarray, " token"]:
    """All documents, one after another with `separator` between them, as tokens, int32 [token]."""
    stream: list[np.ndarray] = []
    between = encode(encoding, separator)
    for document in documents:
        stream += [between, encode(encoding, document)]
    return np.concatenate(stream[1:]) if stream else np.zeros(0, np.int32)


def on_device(ids: Int[np.ndarray, " token"], length: int) -> Int32[Array, " token"]:
    """The token stream as a device array for `random_batch`, int32 [token].

    Raises ValueError when there are too few tokens for one window of `length`, and when `length` is below 1.
    """
    _check(len(ids), length, needed=length + 1, what="one window")
    return jnp.asarray(ids, jnp.int32)


def random_batch(
    tokens: Int32[Array, " token"], key: PRNGKeyArray, step: int | Int[Array, ""], *, batch: int, length: int
) -> Int32[Array, "batch length_plus_one"]:
    """`batch` windows at uniformly random places, drawn with `fold_in(key, step)`; int32 [batch, length + 1].

    Pure: it runs inside jit, scan (over `step`) and vmap (over `key`). Every window of the stream is equally
    likely. Raises ValueError, when traced, for a stream too short for one window.
    """
    _check(tokens.shape[0], length, needed=length + 1, what="one window")
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, tokens.shape[0] - length)
    return tokens[starts[:, None] + jnp.arange(length + 1)]


def tracks(ids: Int[np.ndarray, " token"], batch: int, length: int) -> Int32[Array, "batch track"]:
    """The stream cut in `batch` equal parallel tracks, for `sequential_batch`; what is left over is dropped.

    Track b holds the tokens b * n // batch and after: int32 [batch, len(ids) // batch]. This is the batching
    of PyTorch's word language model example.

    Raises ValueError when a track is too short for one window, and when `batch` or `length` is below 1.
    """
    if batch < 1:
        raise ValueError(f"The batch size is {batch}; it must be at least 1.")
    _check(len(ids), length, needed=batch * (length + 1), what=f"one window in each of {batch} tracks")
    track = len(ids) // batch
    return jnp.asarray(np.asarray(ids[: batch * track]).reshape(batch, track), jnp.int32)


def steps_per_epoch(track: int, length: int) -> int:
    """How many consecutive windows of `length` a track of `track` tokens holds, each target counted once."""
    return (track - 1) // length


def sequential_batch(
    cut: Int32[Array, "batch track"], step: int | Int[Array, ""], *, length: int
) -> Int32[Array, "batch length_plus_one"]:
    """The step-th consecutive window of every track, from the start again after the last; [batch, length +
    1].

    The last token of a window is the first of the next, so that every token but the first is a target once.
    """
    _check(cut.shape[1], length, needed=length + 1, what="one window in each track")
    start = (step % steps_per_epoch(cut.shape[1], length)) * length
    return jax.lax.dynamic_slice_in_dim(cut, start, length + 1, axis=1)


def windows(ids: Int[np.ndarray, " token"], length: int) -> Int32[np.ndarray, "window length_plus_one"]:
    """The stream as consecutive windows, int32 [(len(ids) - 1) // length, length + 1]: for validation.

    Neighbors share one token, so that every token but the first is a target once; the remainder is dropped.

    Raises ValueError when there are too few tokens for one window of `length`, and when `length` is below 1.
    """
    _check(len(ids), length, needed=length + 1, what="one window")
    starts = np.arange(steps_per_epoch(len(ids), length))[:, None] * length
    return np.asarray(ids, np.int32)[starts + np.arange(length + 1)]


def _check(found: int, length: int, needed: int, what: str) -> None:
    if length < 1:
        raise ValueError(f"The window length is {length}; it must be at least 1.")
    if found < needed:
        raise ValueError(
            f"The text is too short: it has {found} tokens, and {what} of length {length} (and the token "
            "after it) "
            f"needs {needed}. Give more text or a shorter window."
        )
