"""Everything that a training run is, as frozen dataclasses: what a TOML file or ``group.field=value`` can set.

A preset is such a file (``train/presets/*.toml``). Every number is checked before anything runs.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from minitf.train.data_settings import DataSettings

Objective = Literal["next_token", "masked_token", "classification", "regression"]
# A number that may differ between models which train in one program, and is then traced.
Number = Annotated[Any, float]
OptimizerName = Literal[
    "sgd", "adam", "adamw", "lion", "muon", "adafactor", "adamw_8bit", "adamw_4bit", "adamw_4bit_factor"
]

FEW_BITS = ("adamw_8bit", "adamw_4bit", "adamw_4bit_factor")


def _all_but(*names: str) -> tuple[OptimizerName, ...]:
    return tuple(name for name in get_args(OptimizerName) if name not in names)


# What some optimizers do not read: models that differ in one of these alone would be the same.
NOT_READ: Mapping[str, tuple[OptimizerName, ...]] = {
    "second_momentum": ("sgd", "adafactor"),
    "epsilon": ("sgd", "lion", "adafactor"),
    "weight_decay": ("adam",),
    "muon_rate": _all_but("muon"),
    "signed_scale": _all_but(*FEW_BITS),
    "stochastic": _all_but(*FEW_BITS),
    "second": _all_but("adamw_4bit"),
}


def _at_least(settings: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if _is_number(value) and not least <= value < float("inf"):
            what = "a finite number of " if isinstance(value, float) and value >= least else ""
            raise ValueError(f"{name} is {value}; it must be {what}at least {least}")


def _within(settings: Any, name: str, low: float, high: float) -> None:
    value = getattr(settings, name)
    if _is_number(value) and not low <= value < high:
        raise ValueError(f"{name} is {value}; it must be at least {low:g} and below {high:g}")


def _is_number(value: Any) -> bool:
    """Whether it can be looked at: in a sweep numbers are traced, and were checked before."""
    return isinstance(value, int | float)


@dataclass(frozen=True)
class TrainingSettings:
    """How long, on how much, in which precision.

    Raises:
        ValueError: a number that no run can have, by name.
    """

    steps: int = 1000
    batch: int = 32  # sequences in a step
    accumulate: int = 1  # parts in which a step's batch is taken, one after another, to need less memory
    start_from: str = ""  # a trained model, as minitf walk takes it; model's settings then follow from it
    seed: int = 0  # the first; everything random follows from it
    seeds: int = 1  # models that train together, each with its own seed
    at_once: int = 0  # of these, side by side in memory; 0: as many as are fast on this device and fit in it
    precision: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are always float32
    rematerialize: bool = False  # compute each layer again on the way back, to need less memory
    unroll: int = 0  # layers per iteration of the loop over layers; 0: all up to 12 (made again on a CPU: one)
    steps_per_call: int = 0  # steps in one program; 0: chosen by the model's size
    when_not_finite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is not a finite number

    def __post_init__(self) -> None:
        _at_least(self, 1, "steps", "batch", "accumulate", "seeds")
        _at_least(self, 0, "at_once", "unroll", "steps_per_call", "seed")
        # Counts and seeds are int32 on the device.
        for name, most in (("steps", self.steps), ("seed", self.seed + self.seeds - 1)):
            if most >= 2**31:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be below 2^31")
        if self.batch % self.accumulate:
            raise ValueError(f"batch is {self.batch}, which {self.accumulate} parts (accumulate) do not divide")


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimized.

    Raises:
        ValueError: a number outside its range, by name.
    """

    kind: Objective | None = None  # the task's own, or the next token
    label_smoothing: Number = 0.0  # share of the target that is spread over all tokens
    z_loss: Number = 0.0  # weight of the squared log of the softmax's sum (PaLM)
    mask_share: float = 0.15  # masked_token: share of positions to be guessed
    dropout: float = 0.0  # on the start of the walk and on every step
    attention_dropout: float = 0.0  # on the associations
    chunk: int = 0  # rows whose logits are made at a time; 0: all at once where they are few

    def __post_init__(self) -> None:
        for name in ("label_smoothing", "mask_share", "dropout", "attention_dropout"):
            _within(self, name, 0.0, 1.0)
        if self.mask_share == 0:
            raise ValueError("mask_share is 0; it must be above 0, or nothing is asked")
        _at_least(self, 0, "z_loss", "chunk")


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, its schedule, and what surrounds it.

    Raises:
        ValueError: a number outside its range, by name.
    """

    name: OptimizerName = "adamw"
    rate: Number = 1e-3
    momentum: Number = 0.9  # beta1; sgd's velocity
    second_momentum: Number = 0.95  # beta2
    epsilon: Number = 1e-8
    weight_decay: Number = 0.1  # decoupled, times the rate
    decay: Literal["matrices", "all"] = "matrices"  # what decays: linear maps and embeddings, or every weight
    clip: float = 1.0  # largest norm of the gradient; 0 for any
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warm_up: int = 100  # steps over which the rate rises to its value
    cool_down: float = 0.2  # wsd: the share of all steps, at the end, in which the rate falls
    final: float = 0.1  # share of the rate that is left at the end
    muon_rate: Number = 0.02  # muon: of the matrices inside the layers; ``rate`` is that of all other weights
    average: float = 0.0  # decay of a running mean of the weights, kept beside them; 0 for none
    second: Literal["rank1_linear", "block_linear", "block_de0"] = "rank1_linear"  # adamw_4bit: second moments
    signed_scale: bool = False  # adamw_4bit, adamw_8bit: scales carry the sign of the largest value
    stochastic: bool = False  # adamw_4bit, adamw_8bit: round at random, unbiased

    def __post_init__(self) -> None:
        for name in ("momentum", "second_momentum", "average", "cool_down", "final"):
            _within(self, name, 0.0, 1.0)
        _at_least(self, 0, "rate", "muon_rate", "epsilon", "weight_decay", "clip", "warm_up")


def unread(settings: OptimizerSettings) -> list[str]:
    """Names of settings that are not the usual ones, and make no difference to this optimizer."""
    usual = OptimizerSettings()
    own = lambda name: getattr(settings, name) != getattr(usual, name)
    return [name for name, optimizers in NOT_READ.items() if settings.name in optimizers and own(name)]


@dataclass(frozen=True)
class KeepSettings:
    """What is measured, shown and kept on the way; 0 for never.

    Raises:
        ValueError: a negative number, by name.
    """

    checkpoint_every: int = 500  # steps
    last: int = 2  # checkpoints that are kept
    every: int = 0  # and those at multiples of this many steps, for good
    dynamics: bool = False  # and those at steps 0, 1, 2, 4, ... 512, then every 1000 (as Pythia), for good
    evaluate_every: int = 200  # steps between losses on held-out data
    evaluation_batches: int = 8
    statistics_every: int = 0  # steps between statistics of the walk
    sample_every: int = 0  # steps between samples
    sample_tokens: int = 64
    prompt: str = ""  # how samples begin
    tensorboard: bool = False  # also write the metrics for TensorBoard (tensorboardX)
    wandb: str = ""  # also send them to this project of Weights & Biases

    def __post_init__(self) -> None:
        names = [f.name for f in dataclasses.fields(self) if f.type in (int, "int")]
        _at_least(self, 0, *names)
        _at_least(self, 1, "last", "evaluation_batches", "sample_tokens")


@dataclass(frozen=True)
class MeshSettings:
    """Over how many devices what is divided; 1 everywhere is one device.

    Raises:
        ValueError: a number below 1, by name.
    """

    data: int = 1  # the batch
    fsdp: int = 1  # the batch, and the width of the weights and their moments
    tensor: int = 1  # heads, hidden neurons and the vocabulary

    def __post_init__(self) -> None:
        _at_least(self, 1, "data", "fsdp", "tensor")

    @property
    def devices(self) -> int:
        """How many devices it has."""
        return self.data * self.fsdp * self.tensor


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        model: fields of :class:`minitf.ModelConfig`, plain; ``vocabulary`` follows from the data when left out,
            and all of them from a model that ``training.start_from`` names.
        task: ``name`` of a synthetic task (:mod:`minitf.train.tasks`) and its settings; empty to train on files.
        data: the files to train on, where there is no task.
        sweep: names of numbers, such as ``optimizer.rate``, and the values of each; every combination is trained.

    Raises:
        ValueError: a swept number that no run can have, by name, or none at all.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = ObjectiveSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    training: TrainingSettings = TrainingSettings()
    keep: KeepSettings = KeepSettings()
    mesh: MeshSettings = MeshSettings()
    sweep: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def objective_on_files(self) -> Objective:
        """What is minimized on files: what is said, or what they are for."""
        if self.objective.kind:
            return self.objective.kind
        return "classification" if self.data.label else "regression" if self.data.target else "next_token"

    def __post_init__(self) -> None:
        if self.task and self.data.paths:
            raise ValueError(
                f"there are both task.name={self.task.get('name', '')} and data.paths (--text), and a run learns "
                "a task or files; for files choose a preset without a task"
            )
        for name, values in self.sweep.items():
            group, _, number = name.partition(".")
            if not values:
                raise ValueError(f"sweep.{name} has no values")
            if len(set(values)) < len(values):
                raise ValueError(f"sweep.{name} would train equal models: it has a value more than once")
            for value in values:
                try:
                    dataclasses.replace(getattr(self, group), **{number: value})
                except ValueError as error:
                    raise ValueError(f"sweep.{group}.{error}") from error
            if group == "optimizer" and self.optimizer.name in NOT_READ.get(number, ()):
                raise ValueError(
                    f"sweep.{name} would train equal models: optimizer.name={self.optimizer.name} does not read it"
                )


# What may differ between models that train in one program: numbers that the program only multiplies by.
SWEPT = (
    *("optimizer.rate", "optimizer.momentum", "optimizer.second_momentum", "optimizer.epsilon"),
    *("optimizer.weight_decay", "optimizer.muon_rate", "objective.label_smoothing", "objective.z_loss"),
)
