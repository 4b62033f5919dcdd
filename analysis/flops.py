"""How many arithmetic operations a function needs: counted on its jaxpr, loops and all.

XLA's own count takes the body of a loop once, whatever its length, and depends on the device. This one counts what
the results need: a walk whose leaves are dropped costs nothing here either.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

# Moving numbers about, or making random ones: no arithmetic.
MOVES = (
    *("bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice"),
    *("dynamic_update_slice", "expand_dims", "gather", "iota", "optimization_barrier", "pad", "random_bits"),
    *("random_wrap", "random_unwrap", "reshape", "rev", "scatter", "scatter-add", "select_n", "slice", "split"),
    *("squeeze", "stop_gradient", "threefry2x32", "transpose"),
)


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of a call: two for each multiply-add, one for each element of anything else.

    Moving numbers about is free. Of a branch the dearer side counts.

    Args:
        function: any function that JAX can trace.
        *arguments: arrays, or shapes (``jax.ShapeDtypeStruct``); nothing is run.

    Raises:
        ValueError: there is a loop whose length depends on data.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    return _needed(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[0]


def _needed(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[float, list[bool]]:
    """The operations that the wanted results need, and which inputs they need."""
    live = {v for v, want in zip(jaxpr.outvars, wanted, strict=True) if want and not isinstance(v, Literal)}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        results = [v in live for v in equation.outvars]
        if not any(results) and not equation.effects:
            continue
        cost, inputs = _cost(equation, results)
        total += cost
        live |= {v for v, need in zip(equation.invars, inputs, strict=True) if need and not isinstance(v, Literal)}
    return total, [v in live for v in jaxpr.invars]


def _cost(equation: Any, results: list[bool]) -> tuple[float, list[bool]]:
    """What one equation costs for those results, and which of its inputs it needs for them."""
    name, everything = equation.primitive.name, [True] * len(equation.invars)
    if name == "while":
        raise ValueError("a while loop takes as many rounds as the data says; its operations cannot be counted")
    if name == "scan":
        return _scan(equation, results)
    if name == "cond":
        found = [_needed(branch.jaxpr, results) for branch in equation.params["branches"]]
        needed = [any(flags) for flags in zip(*(inputs for _, inputs in found), strict=True)]
        return max(cost for cost, _ in found), [True, *needed]
    inside = [x for x in equation.params.values() if isinstance(x, ClosedJaxpr | Jaxpr)]
    if inside:
        body = inside[0].jaxpr if isinstance(inside[0], ClosedJaxpr) else inside[0]
        if len(body.invars) == len(equation.invars) and len(body.outvars) == len(equation.outvars):
            return _needed(body, results)
        return _needed(body, [True] * len(body.outvars))[0], everything
    return (0.0 if name in MOVES else _arithmetic(equation)), everything


def _arithmetic(equation: Any) -> float:
    """Of one operation on arrays: products by their inner axes, all else by its largest array."""
    parameters = equation.params
    largest = max(v.aval.size for v in (*equation.invars, *equation.outvars))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2.0 * inner * equation.outvars[0].aval.size
    if equation.primitive.name == "fft":
        return 5.0 * largest * math.log2(max(math.prod(parameters["fft_lengths"]), 2))
    return float(largest)


def _scan(equation: Any, results: list[bool]) -> tuple[float, list[bool]]:
    """A carry is wanted when its result is, or when another wanted one is made from it."""
    parameters = equation.params
    constants, carries = parameters["num_consts"], parameters["num_carry"]
    wanted = list(results)
    while True:
        cost, inputs = _needed(parameters["jaxpr"].jaxpr, wanted)
        more = [a or b for a, b in zip(wanted, inputs[constants : constants + carries], strict=False)]
        if more == wanted[:carries]:
            return cost * parameters["length"], [*inputs[:constants], *more, *inputs[constants + carries :]]
        wanted[:carries] = more
