"""Parameters declared once, by named axes and an initializer; made, counted and checked from that.

``declare(config)`` is a tree of declarations with the shape of the parameters. Initialization, counting,
checkpoints and sharding read it, so that a weight is described in one place only.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from minitf import draws
from minitf.config import ModelConfig
from minitf.parameters import (
    AttentionParameters,
    FeedForwardParameters,
    Layer,
    Norm,
    Parameters,
    Transform,
    named,
    path_name,
)

Distribution = Literal["zeros", "ones", "constant", "normal", "uniform", "even", "log"]


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One weight: its axes by name and size, and how it starts.

    ``normal`` has the deviation ``scale``, ``uniform`` that bound, both around ``center``; ``constant`` is
    ``center``; ``even`` goes from ``center - scale`` to ``center + scale`` along the last axis, ``log`` is log 1,
    log 2, ... there.

    ``linear`` weights are linear maps, and vectors by number (of tokens, of places): what a bias, a gain, a rate
    of decay or a kernel of a convolution is not, however many axes it has. ``trained`` ones have gradients.
    """

    axes: tuple[tuple[str, int], ...]
    distribution: Distribution
    scale: float = 0.0
    center: float = 0.0
    linear: bool = False
    trained: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes, in order."""
        return tuple(size for _, size in self.axes)

    @property
    def own_axes(self) -> tuple[str, ...]:
        """Names of the axes of one layer's weight."""
        return tuple(name for name, _ in self.axes if name != "layer")

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Of a linear map the places of the axes that it sums over, and of those that it makes; None of another.

        Heads belong to one map. What ends in the stream's width is summed over all axes before it; what begins
        with heads, and does not, is a map for each of them.
        """
        if not self.linear:
            return None
        own = self.own_axes
        places = tuple(range(len(self.axes) - len(own), len(self.axes)))
        if own[-1] == "width":
            return places[:-1], places[-1:]
        if own[0] == "head":
            places = places[1:]
        return places[:1], places[1:]

    @property
    def random(self) -> bool:
        """Whether it starts at random."""
        return self.distribution in ("normal", "uniform")

    def draw(self, key: Key[Array, ""], dtype: Any) -> Array:
        """A fresh value of this weight."""
        if self.distribution == "normal":
            return self._shifted(self.scale * jax.random.normal(key, self.shape, dtype))
        if self.distribution == "uniform":
            low, high = self.center - self.scale, self.center + self.scale
            return jax.random.uniform(key, self.shape, dtype, low, high)
        return self.constant(dtype)

    def spread(self, uniform: Float[Array, " number"]) -> Array:
        """What :meth:`draw` makes of a key, from numbers of [0, 1) that were drawn with it."""
        uniform = uniform.reshape(self.shape)
        if self.distribution == "normal":
            return self._shifted(self.scale * draws.normal(uniform))
        return draws.between(uniform, self.center - self.scale, self.center + self.scale)

    def constant(self, dtype: Any) -> Array:
        """Where it starts when that is not random."""
        if self.distribution == "even":
            low, high = self.center - self.scale, self.center + self.scale
            return jnp.broadcast_to(jnp.linspace(low, high, self.shape[-1], dtype=dtype), self.shape)
        if self.distribution == "log":
            return jnp.broadcast_to(jnp.log(jnp.arange(1, self.shape[-1] + 1, dtype=dtype)), self.shape)
        if self.distribution == "constant":
            return jnp.full(self.shape, self.center, dtype)
        return jnp.full(self.shape, float(self.distribution == "ones"), dtype)

    def _shifted(self, noise: Array) -> Array:
        return noise + self.center if self.center else noise


@dataclasses.dataclass(frozen=True)
class Make:
    """Declares weights of a model: axes by name (a configuration knows their sizes), and how they start."""

    config: ModelConfig
    sizes: Mapping[str, int]

    def axes(self, names: str, **sizes: int) -> tuple[tuple[str, int], ...]:
        """Names and sizes of axes; ``sizes`` gives those that the configuration does not know."""
        known = {**self.sizes, **sizes}
        return tuple((name, known[name]) for name in names.split())

    def matrix(self, names: str, inputs: str, output: bool = False, **sizes: int) -> Declaration:
        """A linear map; ``inputs`` are the axes that it sums over, ``output`` says that it adds to the stream."""
        axes, config = self.axes(names, **sizes), self.config
        linear = partial(Declaration, axes, linear=True)
        if config.initializer == "zeros":
            return linear("zeros")
        if config.initializer == "fan_in":
            fan_in = math.prod(size for name, size in self.axes(names, **sizes) if name in inputs.split())
            return linear("uniform", 1.0 / math.sqrt(fan_in))
        return linear("normal", 0.02 / math.sqrt(2 * config.layers) if output else 0.02)

    def weight(
        self,
        names: str,
        distribution: Distribution,
        scale: float = 0.0,
        center: float = 0.0,
        *,
        linear: bool = False,
        trained: bool = True,
        **sizes: int,
    ) -> Declaration:
        """Any other weight, or a linear map with a start of its own."""
        return Declaration(self.axes(names, **sizes), distribution, scale, center, linear, trained)

    def bias(self, names: str, present: bool) -> Declaration | None:
        """Zero at the start."""
        return Declaration(self.axes(names), "zeros") if present else None

    def gain(self, names: str, present: bool) -> Declaration | None:
        """One at the start."""
        return Declaration(self.axes(names), "ones") if present else None

    def norm(self, names: str, present: bool) -> Norm:
        """A norm of the configuration's kind."""
        if not present or self.config.norm in ("none", "l2"):
            return Norm()
        return Norm(gain=self.gain(names, True), offset=self.bias(names, self.config.norm == "layer"))

    def attention(self) -> AttentionParameters:
        """Softmax attention's."""
        c = self.config
        if c.attention == "table":
            return AttentionParameters(table=self.matrix("head query_width key_width", "key_width"))
        inner_biases = c.biases or c.query_key_value_biases
        return AttentionParameters(
            query=self.matrix("width head head_width", "width"),
            key=self.matrix("width key_value_head head_width", "width"),
            value=self.matrix("width key_value_head head_width", "width"),
            output=self.matrix("head head_width width", "head head_width", output=True),
            query_bias=self.bias("head head_width", inner_biases),
            key_bias=self.bias("key_value_head head_width", inner_biases),
            value_bias=self.bias("key_value_head head_width", inner_biases),
            output_bias=self.bias("width", c.biases),
            query_gain=self.gain("head_width", c.query_key_norm),
            key_gain=self.gain("head_width", c.query_key_norm),
        )

    def layer(self) -> Layer:
        """One layer."""
        c = self.config
        feed_forward = FeedForwardParameters()
        if c.feed_forward != "none":
            gated = c.feed_forward == "swiglu"
            feed_forward = FeedForwardParameters(
                into=self.matrix("width hidden", "width"),
                gate=self.matrix("width hidden", "width") if gated else None,
                out=self.matrix("hidden width", "hidden", output=True),
                into_bias=self.bias("hidden", c.biases),
                gate_bias=self.bias("hidden", c.biases and gated),
                out_bias=self.bias("width", c.biases),
            )
        return Layer(
            attention_norm=self.norm("width", True),
            attention=self.attention() if c.mixer is None else c.mixer.declare(c, self),
            feed_forward_norm=self.norm("width", c.feed_forward != "none"),
            feed_forward=feed_forward,
        )


def declare(config: ModelConfig) -> Parameters:
    """The declaration of every weight of a model, in the shape of its :class:`Parameters`."""
    c = config
    sizes = {
        "vocabulary": c.vocabulary,
        "position": c.length,
        "token_type": c.token_types,
        "width": c.width,
        "output_width": c.width,
        "query_width": c.width,
        "key_width": c.width,
        "head": c.heads,
        "key_value_head": c.groups,
        "head_width": c.head_size,
        "hidden": c.hidden_size,
    }
    make = Make(c, sizes)
    transform = Transform()
    if c.unembedding_transform:
        transform = Transform(
            weight=make.matrix("width output_width", "width"),
            bias=make.bias("output_width", c.biases),
            norm=make.norm("output_width", True),
        )
    return Parameters(
        embedding=make.matrix("vocabulary width", "width") if c.embedding == "learned" else None,
        position=make.matrix("position width", "width") if c.position == "learned" else None,
        token_type=make.matrix("token_type width", "width") if c.token_types else None,
        embedding_norm=make.norm("width", c.embedding_norm),
        layers=_declare_layers(config, sizes),
        final_norm=make.norm("width", c.pre_norm),
        unembedding_transform=transform,
        unembedding=None if c.tied else make.matrix("width vocabulary", "width"),
        unembedding_bias=make.bias("vocabulary", c.unembedding_bias),
    )


def _declare_layers(config: ModelConfig, sizes: Mapping[str, int]) -> Layer | tuple[Layer, ...]:
    """Equal layers stacked on a leading axis; layers that mix differently one by one."""
    if isinstance(config.mixer, tuple):
        return tuple(Make(config.layer(number), sizes).layer() for number in range(config.layers))

    def stacked(one: Declaration) -> Declaration:
        return dataclasses.replace(one, axes=(("layer", config.layers), *one.axes))

    return jax.tree.map(stacked, Make(config, sizes).layer(), is_leaf=is_declaration)


def is_declaration(x: Any) -> bool:
    """Where a tree of declarations ends, for ``jax.tree.map``."""
    return isinstance(x, Declaration)


def declared(config: ModelConfig) -> dict[str, Declaration]:
    """The declaration of every weight by its name, as :func:`named` has the weights."""
    leaves = jax.tree_util.tree_leaves_with_path(declare(config), is_leaf=is_declaration)
    return {path_name(path): declaration for path, declaration in leaves}


def initialize(config: ModelConfig, key: Key[Array, ""], dtype: Any = jnp.float32) -> Parameters:
    """Fresh parameters. Each weight draws from ``fold_in(key, its number)``, so none depends on another.

    Raises ValueError where the key is none.
    """
    if jnp.ndim(key) == 0 and not jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        raise ValueError(f"key is {key!r}; it must be a random key, such as jax.random.key(0)")
    return _initialize(key, config=config, dtype=dtype)


# Outside of any jit it is one program, not one for each weight; inside, as if written there.
@partial(jax.jit, static_argnames=("config", "dtype"), inline=True)
def _initialize(key: Key[Array, ""], *, config: ModelConfig, dtype: Any) -> Parameters:
    declarations, tree = jax.tree.flatten(declare(config), is_leaf=is_declaration)
    keys = [jax.random.fold_in(key, number) for number in range(len(declarations))]
    chance = [number for number, d in enumerate(declarations) if d.random]
    sizes = [math.prod(declarations[number].shape) for number in chance]
    together = draws.uniforms([keys[number] for number in chance], sizes, dtype)
    if together is None:
        return jax.tree.unflatten(tree, [d.draw(own, dtype) for d, own in zip(declarations, keys, strict=True)])
    weights = [None if d.random else d.constant(dtype) for d in declarations]
    for number, uniform in zip(chance, together, strict=True):
        weights[number] = declarations[number].spread(uniform)
    return jax.tree.unflatten(tree, weights)


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(d.shape) for d in jax.tree.leaves(declare(config), is_leaf=is_declaration))


def check_fit(parameters: Parameters, config: ModelConfig) -> None:
    """Raise ValueError where the parameters are not those of a model of this configuration, naming a weight."""
    has, wanted = named(parameters), _shapes(config, isinstance(parameters.layers, tuple))
    for name in sorted(has.keys() | wanted.keys()):
        if name not in has or name not in wanted:
            lacks = "lack" if name not in has else "have"
            raise ValueError(f"the parameters are not of this model: they {lacks} {name}")
        if has[name].shape != wanted[name]:
            raise ValueError(
                f"the parameters are not of this model: {name} has the shape {has[name].shape}, and the model has "
                f"{wanted[name]}"
            )


@functools.cache
def _shapes(config: ModelConfig, single: bool) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by its name, where layers are single as :func:`split_layers` makes them."""
    found: dict[str, tuple[int, ...]] = {}
    for name, declaration in declared(config).items():
        group, _, rest = name.partition(".")
        if single and group == "layers" and not isinstance(config.mixer, tuple):
            found |= {f"layers.{number}.{rest}": declaration.shape[1:] for number in range(config.layers)}
        else:
            found[name] = declaration.shape
    return found
