"""``minitf bench scan-snap``: how fast and how large the synthetic experiments are."""

import dataclasses
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import jax.numpy as jnp

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say, Worker
from minitf.analysis.scan_snap import synthetic, torch_peer
from minitf.tables import count_walk
from minitf.train.loop import Task, compile_programs, every, train
from minitf.train.optimizers import Rates
from minitf.train.sequence_classes import SYN_SMALL, SequenceClasses, population

# Form and threads (0 for PyTorch's own choice). On a busy machine one thread is much faster than several, which
# wait for each other in every operation; it is the fairer peer there.
PEERS: dict[str, tuple[torch_peer.Form, int]] = {
    "eager PyTorch": ("positions", 0),
    "eager PyTorch, 1 thread": ("positions", 1),
    "eager PyTorch on counts, 1 thread": ("counts", 1),
}


def bench_scan_snap(
    *,
    seed: int = 0,
    rounds: int = 3,
    panels: Sequence[int] = synthetic.MEDIUM_QUERIES,
    seeds: int = 10,
    steps: int = synthetic.STEPS,
    peer_runs: int = 2,
    say: Say = lambda sentence: None,
) -> Iterator[Row]:
    """The Fig. 6 grid against eager PyTorch, the cost of recording the walk, compile time and memory.

    Args:
        seed: first seed of the runs.
        rounds: how often each side is measured, in turns.
        panels: numbers of queries of the panels of Fig. 6.
        seeds: of every cell of the grid.
        steps: of every run.
        peer_runs: how many runs per panel and round the peer does; its time is scaled to the whole grid.
        say: told what is being measured.
    """
    yield from _grid_rows(seed, rounds, panels, seeds, steps, peer_runs, say)
    yield from _recording_rows(seed, rounds, steps, say)
    yield from _memory_rows(seed, panels, seeds, steps, say)


def _grid_rows(
    seed: int, rounds: int, panels: Sequence[int], seeds: int, steps: int, peer_runs: int, say: Say
) -> list[Row]:
    """Throughput of the grid of Fig. 6, as our programs and one run after another in PyTorch."""
    say("compiling the grid of Fig. 6")
    compiled = {q: synthetic.compile_medium(q, seeds, steps=steps) for q in panels}
    rates = synthetic.grid(synthetic.MEDIUM_ATTENTION_RATES, synthetic.MEDIUM_RATIOS)
    cells = len(rates.decoder)
    runs = len(panels) * cells * seeds

    def ours() -> float:
        began = time.perf_counter()
        for queries, programs in compiled.items():
            synthetic.run_medium(queries, seeds, seed=seed, steps=steps, programs=programs)
        return runs / (time.perf_counter() - began)

    def theirs(worker: Worker, form: torch_peer.Form, threads: int) -> float:
        """Runs per second of the whole grid, from a few runs of each panel at rates of the grid's middle."""
        seconds = 0.0
        for queries in panels:
            job = torch_peer.Job(queries, 2, 2.0, 1.0, steps, form, threads, seed=seed)
            done = [worker.ask(torch_peer.line(job))["seconds"] for _ in range(peer_runs)]
            seconds += statistics.mean(done) * cells * seeds
        return runs / seconds

    name, unit = f"Fig. 6 grid, {runs} runs x {steps} steps", "runs/s"
    ours()  # memory is mapped, threads are there
    with ExitStack() as stack:
        if bench.installed("torch"):
            worker = stack.enter_context(Worker("-m", torch_peer.__name__))
            theirs(worker, "positions", 0)
            sides = {peer: partial(theirs, worker, *kind) for peer, kind in PEERS.items()}
            measured = bench.interleaved({"ours": ours, **sides}, rounds, say)
            note = (
                f"compile time apart; torch {worker.greeting['version']}, {worker.greeting['threads']} threads "
                f"unless said, {peer_runs} runs per panel and round, scaled to {cells * seeds}"
            )
            rows = [
                bench.throughput_row(name, peer, measured["ours"], measured[peer], unit, note) for peer in PEERS
            ]
        else:
            measured = bench.interleaved({"ours": ours}, rounds, say)
            rows = [bench.missing_row(name, peer, measured["ours"], unit) for peer in PEERS]
    compiling = sum(programs.seconds for programs in compiled.values())
    return [*rows, bench.value_row("Fig. 6 grid, compile time", [compiling], "s", f"{len(panels)} programs")]


def walk_task(data: SequenceClasses = SYN_SMALL) -> Task:
    """Syn-Small whose records are the whole walk of every class: all points, steps, scores and patterns."""
    plain = synthetic.task(data, "zeros", "sgd")
    everything = population(data)
    return dataclasses.replace(
        plain, record=lambda parameters: count_walk(parameters, everything.queries, everything.counts)
    )


def _recording_rows(seed: int, rounds: int, steps: int, say: Say, seeds: int = 8) -> list[Row]:
    """What recording the full attention walk every second step costs on Syn-Small."""
    say("compiling Syn-Small with and without records")
    rates = Rates(decoder=jnp.array([1.0, 10.0]), attention=jnp.array([1.0, 1.0]))
    keys = synthetic.seed_keys(seed, seeds)
    steps *= 5  # long enough that a difference of a few percent shows
    record_steps = {"recording": every(steps, 2), "not recording": [0, steps]}
    # One chunk each: chunks are for progress, which is not what is compared here.
    tasks = {"recording": walk_task(), "not recording": synthetic.task(SYN_SMALL, "zeros", "sgd")}
    tasks["not recording"] = dataclasses.replace(tasks["not recording"], record=lambda parameters: ())
    programs = {
        name: compile_programs(tasks[name], keys, rates, kept, records_per_chunk=len(kept), how="map")
        for name, kept in record_steps.items()
    }

    def run(name: str) -> float:
        kept = record_steps[name]
        began = time.perf_counter()
        train(tasks[name], keys, rates, kept, records_per_chunk=len(kept), how="map", programs=programs[name])
        return time.perf_counter() - began

    for name in programs:
        run(name)
    sides = {name: partial(run, name) for name in programs}
    measured = bench.interleaved(sides, 2 * rounds + 1, say)
    row = bench.cost_row(
        f"Syn-Small {steps} steps, walk every 2",
        "no record",
        measured["recording"],
        measured["not recording"],
        "s",
        "Syn-Small, 8 seeds x 2 rates, every class's whole walk recorded; 0.91 or more is a cost of at most 10 %",
    )
    return [row]


_PEAK = """
import json, resource
from minitf.analysis.scan_snap import synthetic
programs = synthetic.compile_medium({queries}, {seeds}, steps={steps})
synthetic.run_medium({queries}, {seeds}, seed={seed}, steps={steps}, programs=programs)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"peak": peak, "temporary": programs.temporary_bytes * programs.parts}}))
"""


def _memory_rows(seed: int, panels: Sequence[int], seeds: int, steps: int, say: Say) -> list[Row]:
    """Peak memory of a fresh process that runs the largest panel, and what its program asks for."""
    say("measuring memory in a fresh process")
    largest = max(panels)
    code = _PEAK.format(queries=largest, seeds=seeds, steps=steps, seed=seed)
    # Linux counts the peak in KiB, macOS in bytes.
    peak = bench.measured_alone(code)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    name = f"panel {largest}/{2 * largest}"
    return [
        bench.value_row(
            f"peak memory, {name}",
            [peak["peak"] * unit / 2**20],
            "MiB",
            f"a fresh process that compiles and runs that panel of Fig. 6, {seeds} seeds",
        ),
        bench.value_row(
            f"temporary memory, {name}",
            [peak["temporary"] / 2**20],
            "MiB",
            "of that panel's program, as the compiler says",
        ),
    ]
