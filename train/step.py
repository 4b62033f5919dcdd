"""One training step, and many of them in one program, for one model or for many side by side."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Key

from minitf import ModelConfig, initialize
from minitf.in_turn import in_turn
from minitf.train import optimizers
from minitf.train.batch import Batch
from minitf.train.config import Objective, TrainConfig
from minitf.train.objective import dropout, sums

Tree = Any
# Layers that are compiled one by one: faster than a loop, as long as there are few.
FEW_LAYERS = 12
INITIAL, DATA, NOISE, ROUNDING = range(4)  # what a model's key is folded with


@struct.dataclass
class State:
    """A model while it trains; of many models every leaf has a leading ``model`` axis.

    ``step`` counts the steps taken, ``skipped`` those of them whose numbers were not finite; ``average`` is the
    running mean of the parameters, or None.
    """

    step: Any
    parameters: Any
    moments: Any
    average: Any
    skipped: Any

    @property
    def weights(self) -> Any:
        """What the training is for: the running mean, where there is one."""
        return self.parameters if self.average is None else self.average


@struct.dataclass
class Measures:
    """Of each step, before it: ``loss`` a target (nats; squared error), and the gradient's unclipped norm."""

    loss: Any
    gradient_norm: Any


@dataclass(frozen=True)
class Program:
    """What trains, as pure functions of a key: everything in it is known before anything is compiled.

    Attributes:
        config: the whole run's.
        model: what is trained.
        objective: what is minimized.
        draw: (key, how many) -> batch, where data is made on the device; else batches come from outside.
        as_batch: (window of tokens ``[batch, length + 1]``, key) -> batch, of those that come from outside.
        stream: the sharding of the residual stream, on several devices.

    Raises:
        ValueError: the model sees what it is to learn to tell.
    """

    config: TrainConfig
    model: ModelConfig
    objective: Objective
    draw: Callable[[Key[Array, ""], int], Batch] | None = None
    as_batch: Callable[[Array, Key[Array, ""]], Batch] | None = None
    stream: Any = None

    def __post_init__(self) -> None:
        of_tokens = [name for name in ("label_smoothing", "z_loss") if self._asks_for(f"objective.{name}")]
        if self.objective == "regression" and of_tokens:
            raise ValueError(
                f"objective.{of_tokens[0]} is for tokens that are told; this run tells numbers (regression)"
            )
        # Of a task, numbers stand in the sequence that they are told of; of files, beside it.
        is_inside = self.objective == "next_token" or (self.objective == "regression" and self.draw is not None)
        if is_inside and not self.model.causal:
            raise ValueError(
                "the model is not causal: it sees what comes next, which it is to tell (objective.kind is "
                f"{self.objective!r}). Choose model.causal=true, or of files objective.kind=masked_token"
            )

    def _asks_for(self, name: str) -> bool:
        group, _, field = name.partition(".")
        return name in self.config.sweep or bool(getattr(getattr(self.config, group), field))

    @property
    def unroll(self) -> int | bool:
        """Layers per iteration of the loop over layers; True for all."""
        return layers_at_once(self.config, self.model, jax.default_backend())

    def optimizer(self, hyper: Mapping[str, Any], key: Key[Array, ""]) -> optax.GradientTransformation:
        """The optimizer, with a model's own numbers and the key of what it draws."""
        c = with_numbers(self.config, hyper)
        rounding = jax.random.fold_in(key, ROUNDING)
        return optimizers.from_settings(c.optimizer, self.model, c.training.steps, rounding)

    def start(self, key: Key[Array, ""], hyper: Mapping[str, Any], parameters: Tree = None) -> State:
        """A model that took no step: fresh, or with the parameters given."""
        if parameters is None:
            parameters = initialize(self.model, jax.random.fold_in(key, INITIAL))
        return State(
            step=jnp.zeros((), jnp.int32),
            parameters=parameters,
            moments=self.optimizer(hyper, key).init(parameters),
            average=parameters if self.config.optimizer.average else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    def shapes(self) -> tuple[State, Batch, dict[str, float], Key[Array, ""]]:
        """Of one model: its state and a batch, as shapes, and with them swept numbers and a key to trace with."""
        key, numbers = jax.random.key(0), {name: values[0] for name, values in self.config.sweep.items()}
        window = jax.ShapeDtypeStruct((self.config.training.batch, self.model.length + 1), jnp.int32)
        state = jax.eval_shape(lambda: self.start(key, numbers))
        return state, jax.eval_shape(lambda w: self.batch(key, 0, w), window), numbers, key

    def batch(self, key: Key[Array, ""], step: int | Array, window: Array | None) -> Batch:
        """The batch of a step; the same whenever the step is taken, so that any step can be taken again."""
        key = jax.random.fold_in(jax.random.fold_in(key, DATA), step)
        if self.draw is not None:
            return self.draw(key, self.config.training.batch)
        assert self.as_batch is not None
        assert window is not None
        return self.as_batch(window, key)

    def take(
        self, state: State, key: Key[Array, ""], hyper: Mapping[str, Any], step: Array, window: Array | None
    ) -> tuple[State, Measures]:
        """Step number ``step``, from 0.

        With ``when_not_finite="skip"``, a step whose loss or gradient is not finite, or whose weights would not be
        (by their norm), changes nothing but the counts, and its norm is NaN: no later one starts from what is not
        a number. (Else the run stops there, and need not pay for it.)
        """
        batch = self.batch(key, step, window)
        noise = jax.random.fold_in(jax.random.fold_in(key, NOISE), step)
        loss, gradient = self.gradient(state.parameters, batch, hyper, noise)
        norm = optax.tree.norm(gradient)
        updates, moments = self.optimizer(hyper, key).update(gradient, state.moments, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = state.average
        if average is not None:
            # At first the mean of all so far, as if the decay were smaller.
            decay = jnp.minimum(self.config.optimizer.average, step / (step + 1.0))
            average = optax.tree.update_moment(parameters, average, decay, 1)
        skipped = state.skipped
        if self.config.training.when_not_finite == "skip":
            finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(parameters))
            norm = jnp.where(finite, norm, jnp.nan)
            after = (parameters, moments, average)
            before = (state.parameters, state.moments, state.average)
            parameters, moments, average = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), after, before
            )
            skipped = skipped + ~finite
        return State(step + 1, parameters, moments, average, skipped), Measures(loss, norm)

    def gradient(
        self, parameters: Tree, batch: Batch, hyper: Mapping[str, Any], noise: Key[Array, ""]
    ) -> tuple[Array, Tree]:
        """Mean loss over the batch's targets, and its gradient, in float32; the batch in parts, one by one."""
        parts = self.config.training.accumulate

        def of_part(part: Batch, key: Key[Array, ""]) -> tuple[Array, Array, Tree]:
            (loss, count), slope = jax.value_and_grad(self.loss, has_aux=True)(parameters, part, hyper, key)
            return loss, count, slope

        if parts == 1:
            loss, count, slope = of_part(batch, noise)
        else:
            # Every part has sequences from everywhere in the batch, so that on several devices each has its share.
            apart = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
            keys = jax.random.split(noise, parts)
            zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters))

            def add(total: Tree, part: tuple[Batch, Array]) -> tuple[Tree, None]:
                return jax.tree.map(jnp.add, total, of_part(*part)), None

            (loss, count, slope), _ = jax.lax.scan(add, zero, (apart, keys))
        count = jnp.maximum(count, 1.0)
        return loss / count, jax.tree.map(lambda x: x / count, slope)

    def loss(
        self, parameters: Tree, batch: Batch, hyper: Mapping[str, Any], noise: Key[Array, ""]
    ) -> tuple[Array, Array]:
        """The sum over targets of what is minimized, and their number."""
        c = with_numbers(self.config, hyper)
        rows, length = batch.tokens.shape
        dtype = jnp.dtype(c.training.precision)
        found = sums(
            in_precision(parameters, dtype),
            batch,
            self.model,
            self.objective,
            c.objective,
            edit=dropout(noise, self.model, rows, length, c.objective, dtype),
            unroll=self.unroll,
            rematerialize=c.training.rematerialize,
            sharding=self.stream,
        )
        return found.loss, found.count

    def advance(
        self,
        state: State,
        key: Key[Array, ""],
        hyper: Mapping[str, Any],
        windows: Array | None,
        done: Array,
        to: Array,
        most: int,
    ) -> tuple[State, Measures]:
        """The steps ``done`` to ``to``, at most ``most``; what was measured, ``[most]``, NaN where no step was.

        ``windows`` ``[most, batch, length + 1]`` are the tokens of these steps.
        """

        def take(state: State, step: Array) -> tuple[State, Measures]:
            return self.take(state, key, hyper, step, None if windows is None else windows[step - done])

        return _step_by_step(take, state, done, to, (most,))


def _step_by_step(
    take: Callable[[State, Array], tuple[State, Measures]],
    state: State,
    done: Array,
    to: Array,
    shape: tuple[int, ...],
) -> tuple[State, Measures]:
    """The steps ``done`` to ``to``; measures are of that shape, whose last axis is that of steps."""

    def one(step: Array, carry: tuple[State, Measures]) -> tuple[State, Measures]:
        state, measured = carry
        state, new = take(state, step)
        put = lambda all, x: all.at[..., step - done].set(x.astype(jnp.float32))
        return state, jax.tree.map(put, measured, new)

    empty = Measures(*(jnp.full(shape, jnp.nan, jnp.float32),) * 2)
    # The counter is not the state's: with many models side by side it must be one for all of them.
    return jax.lax.fori_loop(done, to, one, (state, empty))


def layers_at_once(config: TrainConfig, model: ModelConfig, kind: str) -> int | bool:
    """Layers per iteration of the loop over layers, on a device of that kind; True for all.

    Few are compiled one by one. But then XLA for CPUs makes nothing again: what was kept to the way back stays.
    """
    again = config.training.rematerialize and kind == "cpu"
    return config.training.unroll or (1 if again else model.layers <= FEW_LAYERS or 1)


def with_numbers(config: TrainConfig, hyper: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other numbers than its own: ``{"optimizer.rate": 0.01}``; they may be traced."""
    for name, value in hyper.items():
        group, _, field = name.partition(".")
        settings = dataclasses.replace(getattr(config, group), **{field: value})
        config = dataclasses.replace(config, **{group: settings})
    return config


def in_precision(parameters: Tree, dtype: Any) -> Tree:
    """The parameters as the computation has them."""
    return jax.tree.map(lambda x: x.astype(dtype), parameters)


def side_by_side(program: Program, most: int, at_once: int) -> Callable[..., tuple[State, Measures]]:
    """Advance of many models: states, keys and numbers have a leading ``model`` axis.

    ``windows`` are ``[seed, most, batch, length + 1]`` and ``seed_of`` ``[model]`` says whose a model sees, so
    that models that differ in their numbers alone share theirs. ``at_once`` models run side by side, the others
    after them.
    """

    def advance(
        states: State,
        keys: Array,
        hyper: Mapping[str, Array],
        windows: Array | None,
        seed_of: Array,
        done: Array,
        to: Array,
    ) -> tuple[State, Measures]:
        def together(models: tuple[State, Array, Mapping[str, Array], Array]) -> tuple[State, Measures]:
            states, keys, numbers, seed_of = models

            # The loop over steps is around what runs side by side: JAX traces a loop that it is to batch anew.
            def take(states: State, step: Array) -> tuple[State, Measures]:
                def one(state: State, key: Array, numbers: Mapping[str, Array], seed: Array) -> Any:
                    window = None if windows is None else windows[seed, step - done]
                    return program.take(state, key, numbers, step, window)

                return jax.vmap(one)(states, keys, numbers, seed_of)

            return _step_by_step(take, states, done, to, (len(keys), most))

        return in_turn(together, (states, keys, hyper, seed_of), at_once)

    return advance
