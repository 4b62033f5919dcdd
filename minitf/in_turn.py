"""A few at a time, one group after another: what does not fit in memory, or is faster in a core's cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def in_turn(function: Callable[[Any], Any], tree: Any, at_once: int) -> Any:
    """``function`` of ``at_once`` entries at a time, in a loop, and at the end of those that are left.

    Args:
        function: of a tree like the one given, with fewer entries; what it returns has one for each of them.
        tree: arrays whose first axes have as many entries.
        at_once: how many at a time; where they are all, there is no loop.
    """
    many = len(jax.tree.leaves(tree)[0])
    if at_once >= many:
        return function(tree)
    whole = many - many % at_once
    groups = jax.tree.map(lambda x: x[:whole].reshape(-1, at_once, *x.shape[1:]), tree)
    found = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), jax.lax.map(function, groups))
    if whole == many:
        return found
    rest = function(jax.tree.map(lambda x: x[whole:], tree))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), found, rest)
