"""What is compared: the mixers, each in a model with as many parameters as the one of softmax attention."""

from collections.abc import Mapping

from minitf import mixers
from minitf.analysis.every_mixer import BOTH_WAYS, EVERY
from minitf.analysis.mixer_study.tasks import Task
from minitf.config import ModelConfig
from minitf.declaration import count
from minitf.mixers import Mixer

LAYERS, WIDTH, HEADS = 2, 64, 4
WINDOW = 8
# From scratch "frozen" is "uniform": what it is frozen at would have to come from another model.
NOTHING = mixers.Convolution(taps=1)
ROWS: Mapping[str, Mixer | tuple[Mixer, ...]] = {
    "softmax": mixers.Softmax(),
    "softmax, fixed query and key": mixers.Softmax(trained=False),
    f"softmax, window {WINDOW}": mixers.Softmax(window=WINDOW),
    **{name: mixer for name, mixer in EVERY.items() if name not in ("softmax", "frozen")},
    # Attention in the first layer alone.
    "softmax, then nothing": (mixers.Softmax(), NOTHING),
    "nothing": NOTHING,
}
# The data has no part in their association ("nothing" mixes nothing).
BLIND = frozenset(
    {
        *("uniform", "exponential average", "synthesizer, fixed", "synthesizer, trained", "synthesizer, factored"),
        *("FNet", "MLP-Mixer", "S4D", "convolution"),
    }
)
QUICK = (
    "softmax",
    "softmax, fixed query and key",
    "uniform",
    "synthesizer, fixed",
    "synthesizer, trained",
    "FNet",
    "softmax, then nothing",
    "nothing",
)


def possible(row: str, task: Task) -> bool:
    """Whether the mixer can do the task: where later tokens tell the answers, it must not see them."""
    return row not in BOTH_WAYS or not task.answers_inside


def model_for(row: str, task: Task) -> ModelConfig:
    """The row's model for a task; its feed-forward is as wide as makes it as large as softmax attention's."""
    aim = count(_model("softmax", task))
    per_hidden = 2 * LAYERS * WIDTH
    hidden = max(1, 4 * WIDTH + round((aim - count(_model(row, task))) / per_hidden))
    return _model(row, task, hidden)


def _model(row: str, task: Task, hidden: int = 4 * WIDTH) -> ModelConfig:
    return ModelConfig(
        vocabulary=task.vocabulary,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        length=task.length,
        hidden=hidden,
        mixer=ROWS[row],
        causal=row not in BOTH_WAYS,
        initializer="fan_in",
    )
