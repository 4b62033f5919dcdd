"""What a training step does, on paper: operations, and what devices tell each other.

Communication is that of Megatron-LM over ``tensor`` (Shoeybi et al. 2019, section 3; Narayanan et al. 2021,
section 3), of ZeRO's third stage over ``fsdp`` (Rajbhandari et al. 2020, section 7), and an all-reduce of
gradients over ``data``.
"""

import math

from minitf import ModelConfig
from minitf.analysis.plan.devices import Collective
from minitf.analysis.plan.model import Run, numbers_on_device, weights_of
from minitf.train.config import MeshSettings


def communication(run: Run, mesh: MeshSettings, parts: int) -> list[Collective]:
    """Of one step. Each part of the batch gathers weights and reduces gradients anew.

    Over ``data`` and ``tensor`` nothing is told of models side by side but their gradients.
    """
    m, c = run.model, run.number
    divided = gathered = undivided = 0
    fsdp, tensor = (mesh.fsdp, mesh.tensor) if run.models == 1 else (1, 1)
    for declaration in weights_of(m):
        whole, shard = numbers_on_device(declaration, 1, tensor), numbers_on_device(declaration, fsdp, tensor)
        divided += shard
        gathered += whole if whole != shard else 0
        undivided += whole if whole == shard else 0
    found, times = [], parts * run.models * c
    if mesh.data > 1:
        found.append(Collective("data", "all-reduce", "gradients", times * divided, parts))
    if mesh.fsdp > 1:
        layers = parts * (m.layers + 1)
        found += [
            Collective("fsdp", "all-gather", "weights, there and back", 2 * times * gathered, 2 * layers),
            Collective("fsdp", "reduce-scatter", "gradients", times * gathered, layers),
            Collective("fsdp", "all-reduce", "gradients of undivided weights", times * undivided, parts),
        ]
    if tensor > 1:
        stream = max(run.config.training.batch // parts // (mesh.data * mesh.fsdp), 1) * m.length * m.width * c
        sublayers = 1 if m.feed_forward == "none" else 2
        # Each sub-layer's step on the way there, and the gradient of what it read on the way back; the step of the
        # first once more where the layer is made again.
        steps = parts * m.layers * (2 * sublayers + run.config.training.rematerialize)
        ends = parts * (2 if m.vocabulary % tensor == 0 else 0)
        found += [
            Collective("tensor", "all-reduce", "steps and their gradients", steps * stream, steps),
            Collective("tensor", "all-reduce", "of a divided vocabulary", ends * stream, ends),
        ]
    return [one for one in found if one.bytes]


def usual_operations(model: ModelConfig, tokens: int) -> float:
    """Of a step without counting: 6 for each weight but those that are looked up, and 12 L T H h for each token.

    Six operations a weight: two on the way there, four back (Kaplan et al. 2020); attention has as many for each
    of its two products over T keys (half of them where it is causal and computed as such; here all).
    """
    looked_up = model.vocabulary * model.width if model.embedding == "learned" and not model.tied else 0
    looked_up += model.length * model.width if model.position == "learned" else 0
    numbers = sum(math.prod(d.shape) for d in weights_of(model)) - looked_up
    attention = 12 * model.layers * model.length * model.heads * model.head_size
    return float(tokens * (6 * numbers + attention))
