"""The command ``minitf plan``: what a training run needs on each device and how long it takes, before it runs.

For the mesh of the configuration, and for every way to divide the run among more devices: which fit, and which of
those are fastest. Nothing of the model is allocated or compiled, and no data is read.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from minitf.analysis.flops import flops
from minitf.analysis.plan import model as paper
from minitf.analysis.plan import work
from minitf.analysis.plan.devices import Collective, Device, Time, named
from minitf.analysis.plan.model import Memory, Run
from minitf.analysis.run_folder import ANEW, writing_results
from minitf.analysis.training.prepared import model_of
from minitf.analysis.training.start import config_of
from minitf.cores import divisors
from minitf.declaration import count
from minitf.files import write_atomically
from minitf.train import sharding, tasks, trainer
from minitf.train.batch import labelled, masked, measured, next_token
from minitf.train.config import MeshSettings, TrainConfig
from minitf.train.data_settings import DataSettings
from minitf.train.encoding import BPE_PIECES
from minitf.train.settings import as_tables as settings_of
from minitf.train.step import Program

MOST_DEVICES = 4096
BEST = 3  # splits of each number of devices that are told
# Seconds until what a device tells its neighbour begins to arrive: an assumption, as the utilization is.
START = 1e-5
# Vocabularies that are known before any data is.
KNOWN = {"bytes": 256, "gpt2": 50257}


@dataclass(frozen=True)
class Option:
    """One way to divide the run, and what comes of it.

    Attributes:
        mesh, parts: the settings ``mesh`` and ``training.accumulate``.
        memory, time: on each device.
        collectives: what the devices tell each other in a step.
        fits: whether the device has the memory.
    """

    mesh: MeshSettings
    parts: int
    memory: Memory
    time: Time
    collectives: tuple[Collective, ...]
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What is planned, and every option that is told.

    Attributes:
        run: the run.
        device: the device that it is planned for.
        utilization: share of the peak that arithmetic is assumed to reach.
        steps: in one call of the program.
        chosen: the configuration's own mesh; of another number of devices, the best of it. None where none divides
            the batch.
        options: for each number of devices the best, fitting ones first, then by time.
    """

    run: Run
    device: Device
    utilization: float
    steps: int
    chosen: Option | None
    options: dict[int, tuple[Option, ...]]

    @property
    def tokens(self) -> int:
        """Of a step of all models."""
        return self.run.models * self.run.config.training.batch * self.run.model.length


def plan(config: TrainConfig, device: str, devices: int | None = None, utilization: float = 0.4) -> Plan:
    """Plan a run for devices of that name (:func:`minitf.analysis.plan.devices.named`).

    Args:
        config: the run; its mesh is planned as it is, where it has so many devices.
        device: such as H100 or TPU v5e.
        devices: how many; None for as many as the mesh has.
        utilization: the share of the device's peak that its arithmetic reaches, above 0, at most 1.

    Raises ValueError for a device that is not known, numbers out of range, a configuration that cannot be trained,
    a batch that the mesh does not divide, and data whose vocabulary is not known before it is read.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"utilization is {utilization}; it must be above 0 and at most 1")
    if devices is not None and devices < 1:
        raise ValueError(f"devices is {devices}; it must be at least 1")
    on, run, own = named(device), run_of(config), config.mesh
    first = devices or own.devices
    counts = dict.fromkeys([first, *(2**n for n in range(MOST_DEVICES.bit_length()) if 2**n > first)])
    steps = trainer.steps_per_call(config, run.operations * run.models, on.kind)
    found = {many: options(run, on, many, steps, utilization) for many in counts}
    if own.devices == first:
        sharding.check_divides(config.training, own)
        chosen: Option | None = option(run, on, own, config.training.accumulate, steps, utilization)
    else:
        chosen = next(iter(found[first]), None)
    return Plan(run, on, utilization, steps, chosen, {many: some[:BEST] for many, some in found.items()})


def run_of(config: TrainConfig) -> Run:
    """What of a run is known without its data. Raises ValueError as :func:`plan` does."""
    program = program_of(config)
    models = trainer.models_of(config)
    many = len(models.seeds)
    state, batch, numbers, key = program.shapes()
    try:
        operations = flops(program.gradient, state.parameters, batch, numbers, key)
    except ValueError:  # a mixer with a loop whose length only data knows
        operations = work.usual_operations(program.model, config.training.batch * program.model.length)
    if many > 1:
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct((many, *x.shape), x.dtype), state)
    different = len(models.different_seeds)
    return Run(config, program.model, program.objective, state, many, different, program.draw is None, operations)


def program_of(config: TrainConfig) -> Program:
    """What trains, with tokens of files in their place only."""
    start = config_of(config.training.start_from) if config.training.start_from else None
    if config.task:
        settings = dict(config.task)
        task = tasks.make(str(settings.pop("name", "")), settings)
        model = model_of(config, task.vocabulary, task.length, start=start)
        return Program(config, model, config.objective.kind or task.objective, draw=task.draw)
    kind = config.objective_on_files
    is_masked, known = kind == "masked_token", vocabulary_of(config.data)
    if start is not None:
        known = None  # the text has the tokens of that model
    elif known is None and "vocabulary" not in config.model:
        raise ValueError(
            "how many different tokens the data has is not known before it is read; say model.vocabulary=N"
        )
    model = model_of(config, 1 if known is None else known + is_masked, None, causal=not is_masked, start=start)

    def as_batch(window: Any, key: Any) -> Any:
        if is_masked:
            return masked(window[:, :-1], key, config.objective.mask_share, model.vocabulary - 1)
        if kind == "classification":
            return labelled(window, model.vocabulary - 1)
        if kind == "regression":
            return measured(window, model.vocabulary - 1)
        return next_token(window)

    return Program(config, model, kind, as_batch=as_batch)


def vocabulary_of(data: DataSettings) -> int | None:
    """Different tokens of the data, where its settings say so; of a BPE to be trained, as many as asked for."""
    encoding = data.encoding or ("bytes" if data.format == "text" else "")
    if encoding == "bpe":
        return data.vocabulary or BPE_PIECES
    if data.format == "tokens" and data.vocabulary:
        return data.vocabulary
    return KNOWN.get(encoding)


def option(run: Run, device: Device, mesh: MeshSettings, parts: int, steps: int, utilization: float) -> Option:
    """One mesh, its batch taken in so many parts."""
    held = paper.memory(run, mesh, parts, steps, device)
    told = work.communication(run, mesh, parts)
    fits = held.total <= device.memory * device.usable
    return Option(mesh, parts, held, time(run, mesh, told, device, utilization), tuple(told), fits)


def time(run: Run, mesh: MeshSettings, told: Sequence[Collective], device: Device, utilization: float) -> Time:
    """Of a step of all models on a mesh of such devices, which tell each other that.

    A collective takes as long as its bytes go round a ring, and a start for each of the log2(n) rounds that the
    shortest ones have (the usual model of both: Thakur, Rabenseifner and Gropp 2005).
    """
    apart = {"tensor": 1, "fsdp": mesh.tensor, "data": mesh.tensor * mesh.fsdp}
    seconds = dict.fromkeys(paper.AXES, 0.0)
    for one in told:
        many = getattr(mesh, one.axis)
        seconds[one.axis] += one.sent(many) / device.ring(apart[one.axis], many) + one.calls * START * math.log2(
            many
        )
    rate = device.operations * utilization * (device.float32 if run.number == paper.FLOAT32 else 1.0)
    # Models side by side have weights that are whole everywhere, and divide the batch alone.
    undivided = mesh.tensor if run.models > 1 else 1
    state = sum(paper.state_bytes(run, mesh).values())
    return Time(
        compute=run.operations * run.models * undivided / mesh.devices / rate,
        update=2 * state / device.memory_rate,
        **seconds,
    )


def meshes(run: Run, devices: int) -> Iterator[MeshSettings]:
    """Every mesh of so many devices that divides the batch, heads, hidden neurons and width evenly."""
    m, batch = run.model, run.config.training.batch
    for tensor, fsdp in itertools.product(divisors(devices), repeat=2):
        even = m.heads % tensor == 0 and m.hidden_size % tensor == 0 and m.width % fsdp == 0
        whole = devices % (tensor * fsdp) == 0 and batch % (devices // tensor) == 0
        if even and whole and (run.models == 1 or tensor * fsdp == 1):
            yield MeshSettings(devices // (tensor * fsdp), fsdp, tensor)


def options(run: Run, device: Device, devices: int, steps: int, utilization: float) -> tuple[Option, ...]:
    """All meshes of so many devices, each with the fewest parts that fit (or, where none do, the most)."""
    found = []
    for mesh in meshes(run, devices):
        for parts in divisors(run.config.training.batch // (mesh.data * mesh.fsdp)):
            if paper.memory(run, mesh, parts, steps, device).total <= device.memory * device.usable:
                break
        found.append(option(run, device, mesh, parts, steps, utilization))
    return tuple(sorted(found, key=lambda one: (not one.fits, one.time.total, one.memory.total)))


def as_tables(found: Plan) -> list[Table]:
    """For people: what each device holds and a step takes, then the best splits of more devices."""
    tables = [] if found.chosen is None else [_memory_table(found, found.chosen), _time_table(found, found.chosen)]
    return [*tables, _splits_table(found)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


ROWS = {
    "parameters": "weights, float32",
    "moments": "what the optimizer keeps",
    "average": "their running mean",
    "windows": "tokens of a call",
    "arguments": "inputs: all of these",
    "gradients": "gradients",
    "copies": "weights in the computation's precision",
    "gathered": "weights and gradients of a layer, whole over fsdp",
    "kept": "activations for the way back",
    "loss": "a chunk's logits, exponentials, gradient",
    "layer": "the way back through a layer",
    "update": "clipped gradients, updates",
    "in_turn": "new states, where models train in turn",
    "temporary": "the most of these at a time",
    "total": "in all, with the tokens of the next call",
}


def _memory_table(found: Plan, one: Option) -> Table:
    mesh, device = one.mesh, found.device
    title = f"{_sized(count(found.run.model))} parameters on {mesh.devices} x {device.name} ({_split(one)})"
    own = found.run.config.mesh.devices
    if own != mesh.devices:
        title += f": the best way to divide it; its own mesh is of {own}"
    table = _table(title, "each device holds", "MiB")
    sizes = {name: getattr(one.memory, name) for name in ROWS}
    for name, size in sizes.items():
        table.add_row(ROWS[name], f"{size / 2**20:,.1f}")
    may = device.memory * device.usable
    table.add_row(f"of {may / 2**20:,.0f} it may use", "fits" if one.fits else "does not fit")
    return table


def _time_table(found: Plan, one: Option) -> Table:
    title = (
        f"a step at {found.utilization:.0%} of the peak, {found.run.operations * found.run.models:.3g} operations"
    )
    table = _table(title, "", "ms", "MB sent")
    sent = dict.fromkeys(paper.AXES, 0.0)
    for told in one.collectives:
        sent[told.axis] += told.sent(getattr(one.mesh, told.axis))
    for name, seconds in dataclasses.asdict(one.time).items():
        table.add_row(name, f"{1e3 * seconds:,.2f}", f"{sent[name] / 1e6:,.1f}" if name in sent else "")
    table.add_row("step", f"{1e3 * one.time.total:,.2f}", "")
    hours = one.time.total * found.run.config.training.steps / 3600
    table.add_row(f"{found.tokens / one.time.total:,.0f} tokens/s", f"{hours:,.1f} h", "")
    return table


def _splits_table(found: Plan) -> Table:
    columns = (
        "devices",
        "data",
        "fsdp",
        "tensor",
        "parts",
        "GiB each",
        "fits",
        "ms a step",
        "Mtokens/s",
        "busy",
    )
    table = _table("the best splits of so many devices", *columns)
    for many, some in found.options.items():
        for one in some:
            m, seconds = one.mesh, one.time.total
            table.add_row(
                *map(str, (many, m.data, m.fsdp, m.tensor, one.parts)),
                f"{one.memory.total / 2**30:.1f}",
                "yes" if one.fits else "no",
                f"{1e3 * seconds:,.1f}",
                f"{found.tokens / seconds / 1e6:,.3f}",
                f"{one.time.compute / seconds:.0%}",
            )
    without = [str(many) for many, some in found.options.items() if not some]
    if without:
        table.caption = f"the batch or the model cannot be divided evenly among {', '.join(without)} devices"
    return table


def _split(one: Option) -> str:
    m = one.mesh
    return f"data {m.data}, fsdp {m.fsdp}, tensor {m.tensor}, accumulate {one.parts}"


def _sized(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def as_json(found: Plan) -> dict[str, Any]:
    """Everything that was found, as JSON can hold it."""

    def plain(one: Option) -> dict[str, Any]:
        fields = dataclasses.asdict(one)
        fields["memory"] |= {"arguments": one.memory.arguments, "total": one.memory.total}
        fields["time"]["total"] = one.time.total
        fields["tokens_per_second"] = found.tokens / one.time.total
        return fields

    run = found.run
    return {
        "config": settings_of(run.config),
        "parameters": count(run.model),
        "operations": run.operations * run.models,
        "usual_operations": run.models
        * work.usual_operations(run.model, run.config.training.batch * run.model.length),
        "device": dataclasses.asdict(found.device) | {"operations": found.device.operations},
        "utilization": found.utilization,
        "steps_per_call": found.steps,
        "chosen": None if found.chosen is None else plain(found.chosen),
        "options": {str(many): [plain(one) for one in some] for many, some in found.options.items()},
    }


def run(
    config: TrainConfig,
    out: Path,
    device: str,
    devices: int | None = None,
    utilization: float = 0.4,
    console: Console | None = None,
) -> Path:
    """Plan, print, and write ``plan.json`` to ``out``; returns its path. Raises ValueError."""
    found = plan(config, device, devices, utilization)
    for table in as_tables(found):
        (console or Console()).print(table)
    file = out / "plan.json"
    with writing_results(out, ANEW):
        write_atomically(file, (json.dumps(as_json(found), indent=1) + "\n").encode())
    return file
