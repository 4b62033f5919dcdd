"""``minitf bench train``: tokens trained on per CPU second, beside the same model in PyTorch, eager and compiled;
and what it costs to record statistics of the walk meanwhile.

Both sides train on one core in processes of their own and take turns. Each has both settings of the system's
allocator, and its better one counts: memory that is handed back to the system after every step costs page faults
in the next (large models), and one that is kept costs a little in every call (tiny ones).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say, Worker
from minitf.analysis.train_bench.sizes import SIZES, Size

OURS = ("-m", "minitf.analysis.train_bench.ours")
PEER = ("-m", "minitf.analysis.train_bench.peer")
# By glibc alone; elsewhere it does nothing.
KEPT = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592"
}
EVERY = 100  # steps, at which the walk is looked at
ALLOCATORS: Mapping[str, Mapping[str, str]] = {"as usual": {}, "memory kept": KEPT}


def bench_train(
    *,
    seed: int = 0,
    rounds: int = 5,
    say: Say = lambda sentence: None,
    sizes: Sequence[Size] = SIZES,
    compiled: bool = True,
    allocators: Mapping[str, Mapping[str, str]] = ALLOCATORS,
) -> list[Row]:
    """Training of each size beside PyTorch's, where it is installed.

    Args:
        seed: not used: both sides train on random tokens.
        rounds: turns of each side.
        say: told what is being measured.
        sizes: of the models.
        compiled: also beside ``torch.compile``, which takes a minute to compile.
        allocators: environments, by name, in which both sides run.
    """
    del seed
    peers = (("eager", "compiled") if compiled else ("eager",)) if bench.installed("torch") else ()
    rows: list[Row] = []
    for size in sizes:
        rows += _rows(size, peers, rounds, say, allocators)
    return rows


def _rows(
    size: Size, peers: Sequence[str], rounds: int, say: Say, allocators: Mapping[str, Mapping[str, str]]
) -> list[Row]:
    """The better allocator of each side, by medians; a peer trains one model after another."""
    name = f"training, {size.name}"
    found: dict[str, dict[str, list[float]]] = {side: {} for side in ("ours", *peers)}
    looks: dict[str, list[float]] = {}
    for allocator, environment in allocators.items():
        with Worker(*OURS, environment=environment) as ours, Worker(*PEER, environment=environment) as peer:
            ask = {"ours": (ours, "train"), "look": (ours, "look"), **{one: (peer, one) for one in peers}}
            for side, (worker, task) in ask.items():
                say(f"{name}: compiling, {side}")
                worker.ask(_question(size, task, 0))

            def seconds(side: str) -> float:
                worker, task = ask[side]  # noqa: B023
                return worker.ask(_question(size, task, 1))["seconds"]

            turns = {side: (lambda side=side: seconds(side)) for side in ask}
            measured = bench.interleaved(turns, rounds, lambda what: say(f"{name}: {what}"))
            for side, by_allocator in found.items():
                models = size.seeds if side == "ours" else 1
                by_allocator[allocator] = [models * size.tokens / one for one in measured[side]]
            # One look at the walks of all models, in percent of the steps after which it is due.
            looks[allocator] = [
                100 * look / (train / size.steps * EVERY)
                for look, train in zip(measured["look"], measured["ours"], strict=True)
            ]
    best = {side: max(by.items(), key=lambda item: sorted(item[1])[rounds // 2]) for side, by in found.items()}
    kept, ours_best = best["ours"]
    beside = [
        bench.throughput_row(
            name,
            f"PyTorch, {one}",
            ours_best,
            best[one][1],
            "tokens/s",
            f"one core, CPU time; memory: ours {kept}, {one} {best[one][0]}",
        )
        for one in peers
    ]
    recorded = bench.value_row(
        f"{name}: recording the walk", looks[kept], f"% of {EVERY} steps", f"once in {EVERY} steps; CPU time"
    )
    return [*(beside or [bench.missing_row(name, "PyTorch", ours_best, "tokens/s")]), recorded]


def _question(size: Size, task: str, repeats: int) -> str:
    return json.dumps({"folder": size.name, "size": dataclasses.asdict(size), "task": task, "repeats": repeats})
