"""The decoding walk: one token after another, each step a forward pass over the new token alone.

What earlier positions leave to later ones is the state of each layer's mixer: keys and values of softmax
attention, a few sums of a recurrent one. A walk that is given those of the past returns them with its own, and a
step is a pure function.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from minitf.config import ModelConfig
from minitf.layer import mixer_of
from minitf.model import walk_on
from minitf.parameters import Parameters, split_layers
from minitf.places import Cache, together
from minitf.walk import Edit, Walk

Tree = Any

COLDEST = 1e-30  # colder, float32 has no numbers; far above it the most likely token is chosen for certain
DEEP = 48  # layers that are taken apart once, not in every step, and compiled one by one, at most


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token always (greedy).
        top_k: only the k most likely may be chosen; 0 for all.
        top_p: only the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020).
        min_p: only tokens at least this fraction as likely as the most likely one (Nguyen et al. 2024).

    Several limits hold together; each looks at the probabilities at this temperature.

    Raises:
        ValueError: a number is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number of at least 0")
        if not 0 <= self.top_k < float("inf") or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}; it must be a whole number of at least 0, which means all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be from 0 to 1")


@struct.dataclass
class Generation:
    """What was generated.

    ``tokens`` ``[batch, step]``, of which each sequence's first ``lengths`` ``[batch]`` count: a stop token is
    the last that does. ``records`` is what was recorded at each step, ``[step, ...]``, or ``()``.
    """

    tokens: Any
    lengths: Any
    records: Tree = ()


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for ``slots`` positions, nothing in it.

    Raises:
        ValueError: the model is not causal, or is shorter than that.
    """
    if not config.causal:
        raise ValueError(
            "this model is not causal: its earlier positions see later ones, so nothing can be cached"
        )
    if slots > config.length:
        raise ValueError(f"{slots} positions are more than the model's length of {config.length}")
    states = [mixer_of(config.layer(i)).start(config, batch, slots, dtype) for i in range(config.layers)]
    return Cache(together(states, config), jnp.zeros(batch, jnp.int32), slots)


def likely(logits: Float[Array, "batch vocabulary"], sampling: Sampling) -> Float[Array, "batch vocabulary"]:
    """Logits, less the largest, divided by the temperature; -inf where ``sampling`` forbids the token.

    Not for temperature 0. Of tokens that are equally likely, ``top_k`` takes the first.
    """
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / max(sampling.temperature, COLDEST)
    allowed = jnp.ones(logits.shape, bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        first = jax.lax.top_k(logits, int(sampling.top_k))[1]
        allowed = (~allowed).at[jnp.arange(len(first))[:, None], first].set(True)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        probability = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
        # The token that crosses the limit is the last one inside it.
        inside = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        allowed &= jnp.take_along_axis(inside, jnp.argsort(order, axis=-1), axis=-1)
    if sampling.min_p > 0:
        probability = jax.nn.softmax(logits)
        allowed &= probability >= sampling.min_p * jnp.max(probability, axis=-1, keepdims=True)
    return jnp.where(allowed, logits, -jnp.inf)


def sample(
    logits: Float[Array, "batch vocabulary"], key: Key[Array, ""], sampling: Sampling
) -> Int[Array, " batch"]:
    """The next token of each sequence."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, likely(logits, sampling)).astype(jnp.int32)


@struct.dataclass
class _State:
    """Between two steps: the cache, each sequence's next token, and which sequences have stopped."""

    cache: Cache
    token: Any
    stopped: Any
    step: Any


def generate(
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    steps: int,
    sampling: Sampling = Sampling(),
    key: Key[Array, ""] | None = None,
    stop: Sequence[int] = (),
    edit: Edit | None = None,
    record: Callable[[Walk], Tree] | None = None,
    unroll: int | bool = 1,
) -> Generation:
    """Continue every prompt by up to ``steps`` tokens, in one program.

    Args:
        parameters: of a causal model.
        prompts: token ids; they may differ in length.
        config: the model's.
        steps: most tokens to add to each prompt.
        sampling: how each is chosen.
        key: of the random choices; step i uses ``fold_in(key, i)``.
        stop: tokens that end a sequence.
        edit: applied at every step and to the prompt, so its position axes must have length 1: steering, say.
        record: of the walk over each generated token, what to keep.
        unroll: layers per iteration of the scan over them, in models too deep to take them one by one.

    Raises:
        ValueError: a prompt is empty or has tokens that are not in the vocabulary, as what stops; prompt and steps
            do not fit into the model's length; the key is a number; the model is not causal.
    """
    tokens, lengths = _padded(prompts, config, steps)
    key = jax.random.key(0) if key is None else key
    _check(stop, key, config)
    return _run(
        parameters,
        jnp.asarray(tokens),
        jnp.asarray(lengths),
        key,
        edit,
        config=config,
        steps=steps,
        sampling=sampling,
        stop=tuple(stop),
        record=record,
        unroll=unroll,
    )


def stream(
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    config: ModelConfig,
    *,
    steps: int,
    sampling: Sampling = Sampling(),
    key: Key[Array, ""] | None = None,
    stop: Sequence[int] = (),
    edit: Edit | None = None,
) -> Iterator[Int[np.ndarray, " batch"]]:
    """The tokens of :func:`generate` as they come, one ``[batch]`` array a step; -1 after a sequence's stop."""
    tokens, lengths = _padded(prompts, config, steps)
    key = jax.random.key(0) if key is None else key
    _check(stop, key, config)
    parameters = split_layers(parameters, most=DEEP)
    slots = tokens.shape[1] + steps
    how: dict[str, Any] = {"config": config, "sampling": sampling}
    state = _begin(parameters, jnp.asarray(tokens), jnp.asarray(lengths), key, edit, slots=slots, **how)
    for _ in range(steps):
        yield np.where(np.asarray(state.stopped), -1, np.asarray(state.token))
        state, _ = _step(parameters, state, key, edit, stop=tuple(stop), **how)
        if np.all(state.stopped):
            return


def _padded(
    prompts: Sequence[Sequence[int]], config: ModelConfig, steps: int
) -> tuple[Int[np.ndarray, "batch position"], Int[np.ndarray, " batch"]]:
    """The prompts as one array, zeros after the shorter ones, checked; and their lengths."""
    if not isinstance(steps, int | np.integer):
        raise ValueError(f"steps is {steps}; it must be a whole number")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least one token must be generated")
    if not len(prompts):
        raise ValueError("there is no prompt")
    for i, prompt in enumerate(prompts):
        if not hasattr(prompt, "__len__"):
            raise ValueError(f"prompt {i} is {prompt!r}; each is a list of tokens, a single one too: [[3, 1, 4]]")
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty; it must hold at least one token")
        _check_tokens(prompt, f"prompt {i} holds", config)
    longest = max(len(p) for p in prompts)
    if longest + steps > config.length:
        raise ValueError(
            f"a prompt of {longest} tokens and {steps} steps are more than the model's length of {config.length}"
        )
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def _check(stop: Sequence[int], key: Any, config: ModelConfig) -> None:
    if not hasattr(stop, "__len__"):
        raise ValueError(f"stop is {stop!r}; it is a list of tokens, a single one too: [{stop!r}]")
    _check_tokens(stop, "stop holds", config)
    if not jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        raise ValueError(f"key is a {type(key).__name__}; make one from a number: jax.random.key(0)")


def _check_tokens(tokens: Any, where: str, config: ModelConfig) -> None:
    for token in tokens:
        is_number = isinstance(token, int | float | np.number) or getattr(token, "shape", None) == ()
        if not is_number or not 0 <= token < config.vocabulary or token != int(token):
            raise ValueError(f"{where} the token {token!r}; the vocabulary is 0 to {config.vocabulary - 1}")


@partial(jax.jit, static_argnames=("config", "slots", "sampling"))
def _begin(
    parameters: Parameters,
    tokens: Array,
    lengths: Array,
    key: Array,
    edit: Edit | None,
    *,
    config: ModelConfig,
    slots: int,
    sampling: Sampling,
) -> _State:
    """The prompts done and the first token chosen."""
    dtype = jax.tree.leaves(parameters)[0].dtype
    cache = empty_cache(config, len(tokens), slots, dtype)
    counts = jnp.arange(tokens.shape[1]) < lengths[:, None]
    walked, cache = walk_on(parameters, tokens, cache, config, edit=edit, counts=counts)
    last = jnp.take_along_axis(walked.logits, (lengths - 1)[:, None, None], axis=1)[:, 0]
    # Of keys and values, slots of the padding are written again when the sequence gets there, and not read before.
    token = sample(last, jax.random.fold_in(key, 0), sampling)
    return _State(cache, token, jnp.zeros(len(tokens), bool), jnp.int32(1))


@partial(jax.jit, static_argnames=("config", "sampling", "stop", "record", "unroll"))
def _step(
    parameters: Parameters,
    state: _State,
    key: Array,
    edit: Edit | None,
    *,
    config: ModelConfig,
    sampling: Sampling,
    stop: tuple[int, ...],
    record: Callable[[Walk], Tree] | None = None,
    unroll: int | bool = 1,
) -> tuple[_State, Tree]:
    """Walk over the token that was chosen, choose the next."""
    walked, cache = walk_on(parameters, state.token[:, None], state.cache, config, edit=edit, unroll=unroll)
    token = sample(walked.logits[:, 0], jax.random.fold_in(key, state.step), sampling)
    stopped = state.stopped | jnp.isin(state.token, jnp.array(stop, jnp.int32))
    return _State(cache, token, stopped, state.step + 1), () if record is None else record(walked)


@partial(jax.jit, static_argnames=("config", "steps", "sampling", "stop", "record", "unroll"))
def _run(
    parameters: Parameters,
    tokens: Array,
    lengths: Array,
    key: Array,
    edit: Edit | None,
    *,
    config: ModelConfig,
    steps: int,
    sampling: Sampling,
    stop: tuple[int, ...],
    record: Callable[[Walk], Tree] | None,
    unroll: int | bool,
) -> Generation:
    """All steps of all prompts."""
    parameters = split_layers(parameters, most=DEEP)
    slots = tokens.shape[1] + steps
    begun = _begin(parameters, tokens, lengths, key, edit, config=config, slots=slots, sampling=sampling)
    how: dict[str, Any] = {
        "config": config,
        "sampling": sampling,
        "stop": stop,
        "record": record,
        "unroll": unroll,
    }

    def step(state: _State, _: None) -> tuple[_State, tuple[Array, Array, Tree]]:
        after, kept = _step(parameters, state, key, edit, **how)
        return after, (state.token, ~state.stopped, kept)

    _, (chosen, counts, records) = jax.lax.scan(step, begun, length=steps)
    return Generation(chosen.T, jnp.sum(counts, axis=0), records)
