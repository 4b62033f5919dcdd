"""What a model is: one frozen dataclass, checked when it is made."""

import dataclasses
import functools
import numbers
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from minitf.filter import ActivationKind, NormKind
from minitf.rotary import RotaryScaling, frequencies

_LEAST = {
    "vocabulary": 1,
    "layers": 1,
    "width": 1,
    "heads": 1,
    "length": 1,
    "head_width": 0,
    "key_value_heads": 0,
    "hidden": 0,
    "token_types": 0,
}

KINDS = {bool: "true or false", int: "a whole number", float: "a number"}

PositionKind = Literal["none", "learned", "sinusoidal", "rotary", "alibi"]


@dataclass(frozen=True)
class ModelConfig:
    """A transformer, from the paper's one-layer token tables to GPT-2, Llama and BERT shapes.

    Sizes left at 0 follow from the others (read them as ``head_size``, ``groups``, ``hidden_size``): a head is
    width / heads wide, every head has its own keys and values, the feed-forward is 4 * width wide.

    Raises:
        ValueError: on a size or a combination that no model can have, naming the field and a value that works.
    """

    vocabulary: int
    layers: int = 1
    width: int = 64
    heads: int = 1
    head_width: int = 0
    key_value_heads: int = 0
    length: int = 128  # longest sequence; learned positions have one vector for each place

    embedding: Literal["learned", "one_hot"] = "learned"
    embedding_scale: float = 1.0
    embedding_norm: bool = False  # a norm on the start of the walk (BLOOM, BERT)
    token_types: int = 0  # vectors for kinds of segment; every token is of the first kind (BERT)
    tied: bool = False  # the unembedding is the embedding, transposed
    biases: bool = False  # on linear maps and norms inside the layers
    query_key_value_biases: bool = False  # on these three maps, even where biases is False (Qwen2)
    unembedding_bias: bool = False
    unembedding_transform: bool = False  # a linear map, the activation and a norm before it (BERT)

    # "query_key": scores from W_Q and W_K, steps through W_V and W_O. "table": one free matrix Z per head gives
    # the score x_query^T Z x_key, and the values are the token vectors themselves (Tian et al. 2023).
    attention: Literal["query_key", "table"] = "query_key"
    # What mixes positions: one of minitf.mixers for all layers, or a tuple with one for each; None is softmax
    # attention, of the kind above. Rotary positions and ALiBi are part of softmax attention alone.
    mixer: Any = None
    causal: bool = True
    attend_self: bool = True
    query_key_norm: bool = False  # a root-mean-square norm on each head's queries and keys (Qwen3)

    position: PositionKind = "learned"
    rotary_fraction: float = 1.0  # share of each head that turns
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    rotary_scaling: RotaryScaling | None = None  # positions stretched for longer texts (Llama 3.1)

    norm: NormKind = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-5
    residual: bool = True
    parallel: bool = False  # attention and feed-forward both read the layer's start

    feed_forward: Literal["none"] | ActivationKind = "gelu_tanh"
    hidden: int = 0

    # "normal": 0.02, output maps scaled by 1 / sqrt(2 layers) (GPT-2). "fan_in": uniform within
    # 1 / sqrt(inputs). "zeros": everything zero, the start of the theory in Tian et al. 2023.
    initializer: Literal["normal", "fan_in", "zeros"] = "normal"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not _fits(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        _check_kinds(type(self), vars(self))
        self._check_choices()
        if self.attention == "query_key" and not self.head_width and self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide a width of {self.width}; choose a width that is a multiple "
                "of heads, or set head_width"
            )
        if self.heads % self.groups:
            raise ValueError(f"key_value_heads is {self.groups}, which does not divide the {self.heads} heads")
        if self.attention == "table" and (self.head_size != self.width or self.groups != 1):
            raise ValueError("table attention mixes whole token vectors: leave head_width, key_value_heads at 0")
        if self.embedding == "one_hot" and (self.width != self.vocabulary or self.tied):
            raise ValueError(
                f"one-hot embeddings are as wide as the vocabulary and cannot be tied; here width is "
                f"{self.width}, vocabulary is {self.vocabulary}, tied is {self.tied}"
            )
        self._check_positions_and_norms()
        self._check_extras()
        self._check_mixers()
        if self.parallel and (self.post_norm or not self.residual):
            raise ValueError("parallel layers need residual=True and norm_placement='pre'")

    def _check_positions_and_norms(self) -> None:
        if not isinstance(self.rotary_scaling, RotaryScaling | None):
            raise ValueError(
                f"rotary_scaling is {self.rotary_scaling!r}; it must be a RotaryScaling or None (from_plain "
                "reads what dataclasses.asdict wrote)"
            )
        if self.position == "rotary":
            if self.attention == "table":
                raise ValueError("table attention has no queries and keys to rotate; choose another position")
            if not 0 < self.rotary_fraction <= 1 or self.rotated_width % 2 or not self.rotated_width:
                raise ValueError(
                    f"rotary_fraction {self.rotary_fraction} of a head_width of {self.head_size} turns "
                    f"{self.rotated_width} components; it must be an even number of at least 2"
                )
            if self.rotary_base <= 0:
                raise ValueError(f"rotary_base is {self.rotary_base}; it must be positive")
            frequencies(self.rotated_width, self.rotary_base, self.rotary_scaling)  # raises where they have none
        if self.embedding_norm and self.norm == "none":
            raise ValueError("embedding_norm needs a norm, but norm is 'none'; choose l2, layer or rms")
        if self.norm_epsilon < 0:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}; it must not be negative")

    def _check_extras(self) -> None:
        if self.token_types and self.position not in ("learned", "sinusoidal"):
            raise ValueError(
                f"the vector of the token type is added to those of the positions, and position is "
                f"{self.position!r}, which has none; choose learned or sinusoidal, or set token_types=0"
            )
        if self.attention == "table" and (self.query_key_norm or self.query_key_value_biases):
            raise ValueError(
                "table attention has no queries and keys to norm or to add biases to: leave query_key_norm "
                "and query_key_value_biases False"
            )
        if self.unembedding_transform and (self.norm == "none" or self.feed_forward in ("none", "swiglu")):
            raise ValueError(
                "unembedding_transform uses the model's norm and its activation, which must be relu, gelu or "
                f"gelu_tanh; here norm is {self.norm!r} and feed_forward is {self.feed_forward!r}"
            )

    def _check_mixers(self) -> None:
        if self.mixer is None:
            return
        hybrid = isinstance(self.mixer, tuple)
        mixers = self.mixer if hybrid else (self.mixer,)
        if hybrid and len(mixers) != self.layers:
            raise ValueError(f"mixer names {len(mixers)} mixers; this model has {self.layers} layers")
        for mixer in mixers:
            if not hasattr(mixer, "association") or isinstance(mixer, type):
                raise ValueError(
                    f"mixer is {mixer!r}; it must be a mixer such as minitf.mixers.Retention(), or a tuple of them"
                )
            if dataclasses.is_dataclass(mixer):
                _check_kinds(type(mixer), vars(mixer), f"{type(mixer).__name__}: ")
        if self.attention == "table" or not self.attend_self:
            raise ValueError("attention='table' and attend_self=False are of softmax attention: leave mixer out")
        if self.position != _position_with(self.position, self.mixer):
            raise ValueError(
                f"position is {self.position!r}, which is a part of softmax attention, and no layer has that; "
                "choose none, learned or sinusoidal"
            )
        if hybrid:
            for number in range(self.layers):
                self.layer(number)  # raises where that layer cannot be
            return
        self.mixer.check(self)
        if self.causal and not self.mixer.about(self).causal:
            kind = type(self.mixer).__name__
            raise ValueError(f"mixer is {kind}, which lets every position see all others: set causal=False")

    def layer(self, number: int) -> "ModelConfig":
        """This configuration with that layer's mixer as its only one."""
        if not isinstance(self.mixer, tuple):
            return self
        mixer = self.mixer[number]
        return dataclasses.replace(self, mixer=mixer, position=_position_with(self.position, mixer))

    def from_layer(self, number: int) -> "ModelConfig":
        """This configuration without the layers before that one."""
        mixer = self.mixer[number:] if isinstance(self.mixer, tuple) else self.mixer
        position = _position_with(self.position, mixer)
        return dataclasses.replace(self, layers=self.layers - number, mixer=mixer, position=position)

    def _check_choices(self) -> None:
        choices = {
            "embedding": ("learned", "one_hot"),
            "attention": ("query_key", "table"),
            "position": get_args(PositionKind),
            "norm": get_args(NormKind),
            "norm_placement": ("pre", "post"),
            "feed_forward": ("none", *get_args(ActivationKind)),
            "initializer": ("normal", "fan_in", "zeros"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        if self.attention == "table":
            return self.head_width or self.width
        return self.head_width or self.width // self.heads

    @property
    def groups(self) -> int:
        """How many heads the keys and values have."""
        return self.key_value_heads or (1 if self.attention == "table" else self.heads)

    @property
    def hidden_size(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return self.hidden or 4 * self.width

    @property
    def rotated_width(self) -> int:
        """How many components of each head turn with the position."""
        return int(self.head_size * self.rotary_fraction)

    @property
    def post_norm(self) -> bool:
        """Whether a norm follows each sub-layer."""
        return self.norm != "none" and self.norm_placement == "post"

    @property
    def pre_norm(self) -> bool:
        """Whether a norm precedes each sub-layer (and the unembedding)."""
        return self.norm != "none" and self.norm_placement == "pre"


def _check_kinds(of: type, given: Mapping[str, Any], what: str = "") -> None:
    """Text is no number, and no truth value either: ``"no"`` would be a yes."""
    for name, value in given.items():
        kind = _kinds(of).get(name)
        if kind in KINDS and not _fits(value, kind):
            raise ValueError(f"{what}{name} is {value!r}; it must be {KINDS[kind]}")


def _fits(value: Any, kind: Any) -> bool:
    truth = isinstance(value, bool | np.bool_)
    if kind is bool or truth:
        return kind is bool and truth
    return isinstance(value, int if kind is int else numbers.Real)


@functools.cache
def _kinds(of: type) -> dict[str, Any]:
    return typing.get_type_hints(of)


def _made(of: type, given: Mapping[str, Any], what: str) -> Any:
    """A dataclass of settings that may be anything, as they come from a file."""
    has = {field.name: field for field in dataclasses.fields(of) if field.init}
    for name in given:
        if name not in has:
            raise ValueError(f"{what} has no {name!r}; it has {', '.join(has) or 'no settings'}")
    needed = (name for name, field in has.items() if field.default is field.default_factory is dataclasses.MISSING)
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{what} lacks {', '.join(missing)}")
    _check_kinds(of, given, f"{what}: ")
    return of(**given)


def _position_with(position: PositionKind, mixer: Any) -> PositionKind:
    """The positions that layers of these mixers have: turning and ALiBi are parts of softmax attention."""
    mixers = mixer if isinstance(mixer, tuple) else (mixer,)
    inside = position in ("rotary", "alibi")
    return "none" if inside and not any(one is None or "scores" in one.leaves for one in mixers) else position


def to_plain(config: ModelConfig) -> dict[str, Any]:
    """The configuration as JSON can hold it; :func:`from_plain` reads it.

    Raises ValueError for a mixer with a setting named "kind", which is what its class is called there.
    """

    def named(mixer: Any) -> dict[str, Any]:
        settings = dataclasses.asdict(mixer)
        if "kind" in settings:
            raise ValueError(
                f"{type(mixer).__name__} has a setting named 'kind', which names the mixer: rename it"
            )
        return {"kind": type(mixer).__name__, **settings}

    fields = dataclasses.asdict(dataclasses.replace(config, mixer=None))
    if isinstance(config.mixer, tuple):
        return {**fields, "mixer": [named(mixer) for mixer in config.mixer]}
    return {**fields, "mixer": None if config.mixer is None else named(config.mixer)}


def from_plain(fields: Mapping[str, Any], mixers: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration that :func:`to_plain`, and perhaps JSON after it, wrote down.

    ``mixers`` are classes by name, for those that are not in :mod:`minitf.mixers`. A mixer may be given by its
    name alone, with the usual settings. Raises ValueError for one that is not known, or has no such setting.
    """
    from minitf import mixers as known  # noqa: PLC0415 (they are made of configurations)

    is_mixer = lambda x: isinstance(x, type) and issubclass(x, known.Mixer) and x is not known.Mixer
    classes = {name: x for name, x in vars(known).items() if is_mixer(x)} | dict(mixers or {})

    def made(named: Any) -> Any:
        settings = dict(named) if isinstance(named, Mapping) else {"kind": named}
        if "kind" not in settings:
            raise ValueError(f"mixer is {settings}, without a kind, such as kind = 'Convolution'")
        kind = settings.pop("kind")
        if not isinstance(kind, str) or kind not in classes:
            names = ", ".join(sorted(classes))
            raise ValueError(f"mixer is {kind!r}; choose one of {names}, or give its class in mixers")
        return _made(classes[kind], settings, f"mixer {kind}")

    scaling, mixer = fields.get("rotary_scaling"), fields.get("mixer")
    if mixer is not None:
        mixer = tuple(made(one) for one in mixer) if isinstance(mixer, list | tuple) else made(mixer)
    return ModelConfig(
        **{
            **fields,
            "rotary_scaling": _made(RotaryScaling, scaling, "rotary_scaling")
            if isinstance(scaling, Mapping)
            else scaling,
            "mixer": mixer,
        }
    )


def token_tables(vocabulary: int, initializer: Literal["fan_in", "zeros"] = "zeros") -> ModelConfig:
    """The model of Tian et al. 2023 (Scan and Snap), section 2: free tables Y (decoder) and Z (attention).

    One layer over one-hot tokens; the query does not see itself; no positions, no residual, no feed-forward;
    the attended sum is divided by its l2 length.
    """
    return ModelConfig(
        vocabulary=vocabulary,
        width=vocabulary,
        embedding="one_hot",
        attention="table",
        attend_self=False,
        position="none",
        norm="l2",
        norm_placement="post",
        residual=False,
        feed_forward="none",
        initializer=initializer,
    )
