"""A worker's loop, for our side and the peers alike: a line of JSON asks, a line of JSON answers.

Standard library only: the peers run in environments that may not have JAX.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Task = Callable[[], Any]
# From a model's folder and its size to what can be measured with it: each task runs once.
Prepare = Callable[[str, dict[str, int]], dict[str, Task]]


def begin() -> str:
    """The device to measure on, as the worker's argument says: ``cpu`` unless it does.

    There, stay on one core, where the system allows it: before any library makes its threads.
    """
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return device


def serve(greeting: dict[str, Any], prepare: Prepare, device: str = "cpu") -> None:
    """Greet, then answer until the input ends.

    A question is ``{"folder", "size", "task", "repeats"}``; the answer has the least seconds of one repeat, and
    the task's value. On a CPU they are CPU time, not the clock's: what else the machine does then counts for
    little. Without repeats it has the seconds of a first run, by the clock: compiling is done by many threads.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    print(json.dumps(greeting), flush=True)
    prepared: dict[str, dict[str, Task]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["folder"] not in prepared:
            prepared[asked["folder"]] = prepare(asked["folder"], asked["size"])
        task = prepared[asked["folder"]][asked["task"]]
        if asked["repeats"] == 0:  # a first run, which compiles
            began = time.perf_counter()
            value = task()
            print(json.dumps({"seconds": time.perf_counter() - began, "value": value}), flush=True)
            continue
        seconds = []
        for _ in range(asked["repeats"]):
            gc.collect()
            began = clock()
            task()
            seconds.append(clock() - began)
        print(json.dumps({"seconds": min(seconds), "value": None}), flush=True)
