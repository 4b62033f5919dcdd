"""``minitf bench train``: tokens trained on per CPU second, beside the same model in PyTorch, eager and compiled;
and what it costs to record statistics of the walk meanwhile.

On a CPU both sides train on one core in processes of their own and take turns. Each has both settings of the
system's allocator, and its better one counts: memory that is handed back to the system after every step costs page
faults in the next (large models), and one that is kept costs a little in every call (tiny ones).

On a GPU they share it, are timed by the clock, and train models that belong there.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from minitf.analysis import bench
from minitf.analysis.bench import Row, Say, Worker
from minitf.analysis.train_bench.sizes import GPU_SIZES, SIZES, Size

OURS = "minitf.analysis.train_bench.ours"
PEER = "minitf.analysis.train_bench.peer"
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
    sizes: Sequence[Size] | None = None,
    compiled: bool = True,
    allocators: Mapping[str, Mapping[str, str]] | None = None,
    device: bench.Device | None = None,
) -> Iterator[Row]:
    """Training of each size beside PyTorch's, where it is installed.

    Args:
        seed: not used: both sides train on random tokens.
        rounds: turns of each side.
        say: told what is being measured.
        sizes: of the models; those for this device, unless they are given.
        compiled: also beside ``torch.compile``, which takes a minute to compile.
        allocators: environments, by name, in which both sides run; those for this device, unless they are given.
        device: to measure on; the one that JAX finds, unless it is given.
    """
    del seed
    device = device or bench.device()
    peers = (("eager", "compiled") if compiled else ("eager",)) if bench.installed("torch") else ()
    allocators = allocators or (ALLOCATORS if device.kind == "cpu" else {"as usual": {}})
    for size in sizes or (SIZES if device.kind == "cpu" else GPU_SIZES):
        beside = () if size.published and not bench.installed("transformers") else peers
        yield from _rows(size, beside, rounds, say, allocators, device)


@dataclass(frozen=True)
class _Measured:
    """Of one size, in one environment, one number for each turn.

    ``rate`` is in tokens a second, of each side; ``first`` the seconds of its first turn; ``look`` the percentage
    of the steps after which it is due that one look at the walks of all models takes; ``products`` operations a
    second, and empty on a CPU.
    """

    rate: dict[str, list[float]]
    first: dict[str, float]
    look: list[float]
    products: list[float]


def _measured(
    size: Size, peers: Sequence[str], rounds: int, say: Say, environment: Mapping[str, str], device: bench.Device
) -> _Measured:
    name = f"training, {size.name}"
    with ExitStack() as stack:
        begun = lambda module: stack.enter_context(Worker("-m", module, device.kind, environment=environment))
        ours = begun(OURS)
        ask = {"ours": (ours, "train"), "look": (ours, "look")}
        if device.kind != "cpu":
            ask["products"] = (ours, "products")
        if peers:
            peer = begun(PEER)
            ask |= {one: (peer, one) for one in peers}

        def answer(side: str, repeats: int) -> dict[str, Any]:
            worker, task = ask[side]
            return worker.ask(_question(size, task, repeats))

        first = {}
        for side in ask:
            say(f"{name}: compiling, {side}")
            first[side] = answer(side, 0)
        turns = {side: (lambda side=side: answer(side, 1)["seconds"]) for side in ask}
        seconds = bench.interleaved(turns, rounds, lambda what: say(f"{name}: {what}"))
    # A peer trains one model after another.
    models = {"ours": size.seeds, **dict.fromkeys(peers, 1)}
    return _Measured(
        rate={side: [many * size.tokens / one for one in seconds[side]] for side, many in models.items()},
        first={side: first[side]["seconds"] for side in models},
        look=[
            100 * look / (train / size.steps * EVERY)
            for look, train in zip(seconds["look"], seconds["ours"], strict=True)
        ],
        products=[first["products"]["value"] / one for one in seconds.get("products", ())],
    )


def _rows(
    size: Size,
    peers: Sequence[str],
    rounds: int,
    say: Say,
    allocators: Mapping[str, Mapping[str, str]],
    device: bench.Device,
) -> list[Row]:
    """Of each side that allocator with which it is faster, by medians."""
    name, library = f"training, {size.name}", "transformers" if size.published else "PyTorch"
    found = {which: _measured(size, peers, rounds, say, with_it, device) for which, with_it in allocators.items()}
    best = {
        side: max(found, key=lambda which: statistics.median(found[which].rate[side])) for side in ("ours", *peers)
    }
    ours = found[best["ours"]]
    how = "one core, CPU time" if device.kind == "cpu" else f"{device.name}, {size.precision}, by the clock"
    rows = [
        bench.throughput_row(
            name,
            f"{library}, {one}",
            ours.rate["ours"],
            found[best[one]].rate[one],
            "tokens/s",
            f"{how}; memory: ours {best['ours']}, {one} {best[one]}",
        )
        for one in peers
    ] or [bench.missing_row(name, library, ours.rate["ours"], "tokens/s")]
    first = "compiling and the first turn, of one model on the other side; by the clock"
    rows += [
        bench.cost_row(
            f"{name}: first turn",
            f"{library}, {one}",
            [ours.first["ours"]],
            [found[best[one]].first[one]],
            "s",
            first,
        )
        for one in peers
    ]
    if ours.products:
        share = [
            100 * tokens * size.flops / can for tokens, can in zip(ours.rate["ours"], ours.products, strict=True)
        ]
        can = f"of {statistics.median(ours.products) / 1e12:.0f} TFLOP/s, measured of dense bfloat16 products"
        rows.append(bench.value_row(f"{name}: model FLOPs", share, "% of products", can))
    recorded = f"once in {EVERY} steps; {how}"
    rows.append(bench.value_row(f"{name}: recording the walk", ours.look, f"% of {EVERY} steps", recorded))
    return rows


def _question(size: Size, task: str, repeats: int) -> str:
    return json.dumps({"folder": size.name, "size": dataclasses.asdict(size), "task": task, "repeats": repeats})
