from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from minitf import initialize, mixers
from minitf.analysis.every_mixer import BOTH_WAYS, EVERY
from minitf.config import ModelConfig, token_tables
from minitf.declaration import declare
from minitf.parameters import named, path_name
from minitf.train.config import NOT_READ, OptimizerName, OptimizerSettings, TrainConfig
from minitf.train.optimizers import (
    Rates,
    adam,
    adamw,
    by_part,
    check_rates,
    clipped,
    decaying,
    from_settings,
    muon_axes,
    sgd,
    share_of_rate,
)

STEPS = 12


@pytest.fixture(autouse=True)
def double():
    """All in float64, where a wrong formula keeps its size and rounding is gone."""
    with jax.enable_x64(True):
        yield


def some_gradients(steps=STEPS, size=4):
    return np.random.default_rng(0).normal(size=(steps, size))


def trace(optimizer, start, gradients):
    """The parameters after each step."""
    parameters = jnp.asarray(start)
    state, out = optimizer.init(parameters), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, parameters)
        parameters = optax.apply_updates(parameters, update)
        out.append(np.asarray(parameters))
    return np.array(out)


def torch_trace(make, start, gradients):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, out = make(torch, [weight]), []
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        out.append(weight.detach().numpy().copy())
    return np.array(out)


MODEL = ModelConfig(vocabulary=5, length=4, layers=1, heads=2, width=4)
START = np.array([1.0, -2.0, 0.5, 0.0])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_the_velocity_form_written_by_hand(momentum):
    velocity, weight, expected = np.zeros(4), START.copy(), []
    for gradient in some_gradients():
        velocity = momentum * velocity + gradient
        weight = weight - 0.3 * velocity
        expected.append(weight)
    assert trace(sgd(0.3, momentum), START, some_gradients()) == pytest.approx(np.array(expected), rel=1e-12)


def test_adam_is_the_algorithm_of_its_paper_written_by_hand():
    mean, square, weight, expected = np.zeros(4), np.zeros(4), START.copy(), []
    for t, gradient in enumerate(some_gradients(), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weight = weight - 0.3 * (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        expected.append(weight)
    # 1 - 0.999**t cancels three digits, and sums of few terms lose little more: 1e-10 leaves room for both.
    assert trace(adam(0.3), START, some_gradients()) == pytest.approx(np.array(expected), rel=1e-10)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (sgd(0.3), lambda torch, p: torch.optim.SGD(p, lr=0.3)),
        (sgd(0.3, 0.9), lambda torch, p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        (adam(0.1), lambda torch, p: torch.optim.Adam(p, lr=0.1)),
        (adamw(0.1, 0.05), lambda torch, p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.05)),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_optimizers_are_those_of_torch(ours, theirs):
    expected = torch_trace(theirs, START, some_gradients())
    assert trace(ours, START, some_gradients()) == pytest.approx(expected, rel=1e-10)


def test_weight_decay_shrinks_a_weight_without_gradient_by_rate_times_decay():
    weights = trace(adamw(0.1, 0.2), START, np.zeros((3, 4)))
    assert weights[-1] == pytest.approx(START * (1 - 0.1 * 0.2) ** 3, rel=1e-12)


def ones_like(config):
    """Parameters of a model, all one."""
    return jax.tree.map(lambda d: jnp.ones(d.shape), declare(config), is_leaf=lambda x: hasattr(x, "axes"))


DECAYING = ["sgd", "adamw", "lion", "muon", "adafactor", "adamw_8bit", "adamw_4bit"]


@pytest.mark.parametrize("name", DECAYING)
def test_of_every_optimizer_decay_is_decoupled_and_times_the_rate(name):
    config = ModelConfig(vocabulary=8, layers=1, width=8, heads=2, length=4, biases=True)
    settings = OptimizerSettings(
        name=name, rate=1e-2, muon_rate=1e-2, weight_decay=0.1, schedule="constant", warm_up=0
    )
    optimizer, weights = from_settings(settings, config, steps=9), ones_like(config)

    @jax.jit
    def step(weights, state):
        update, state = optimizer.update(jax.tree.map(jnp.zeros_like, weights), state, weights)
        return optax.apply_updates(weights, update), state

    state = optimizer.init(weights)
    for _ in range(5):
        weights, state = step(weights, state)
    assert weights.embedding == pytest.approx((1 - 1e-3) ** 5, rel=1e-5)
    assert weights.layers.feed_forward.into == pytest.approx((1 - 1e-3) ** 5, rel=1e-5)
    assert weights.layers.attention_norm.gain == pytest.approx(1.0)
    assert weights.layers.attention.query_bias == pytest.approx(1.0)


UNTRAINED = {
    "synthesizer": (mixers.Synthesizer("fixed"), ("scores",)),
    "frozen": (mixers.Frozen(), ("association",)),
    "softmax": (mixers.Softmax(trained=False), ("query", "key")),
}


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("mixer", UNTRAINED)
def test_what_is_never_trained_does_not_decay(mixer, name, decay):
    mixer, untrained = UNTRAINED[mixer]
    config = ModelConfig(vocabulary=8, layers=1, width=8, heads=2, length=4, norm="rms", mixer=mixer)
    settings = OptimizerSettings(name=name, decay=decay, weight_decay=0.1, warm_up=0)
    weights = ones_like(config)
    optimizer = from_settings(settings, config, steps=9)
    slope = jax.tree.map(jnp.zeros_like, weights)
    for weight, update in named(optimizer.update(slope, optimizer.init(weights), weights)[0]).items():
        stays = weight.rpartition(".")[2] in untrained or (decay == "matrices" and weight.endswith("gain"))
        assert bool(jnp.all(update == 0)) == stays, weight


@pytest.mark.parametrize("name", EVERY)
def test_linear_maps_alone_decay_and_are_muons(name):
    """However many axes a bias of heads has, or a gain, a rate of decay, a kernel."""
    config = ModelConfig(
        vocabulary=8,
        layers=2,
        width=8,
        heads=2,
        length=4,
        biases=True,
        norm="layer",
        causal=name not in BOTH_WAYS,
        mixer=EVERY[name],
    )
    mask = named(decaying(config, "matrices")(ones_like(config)))
    is_axes = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    axes = jax.tree_util.tree_leaves_with_path(muon_axes(config), is_leaf=is_axes)
    muons = {path_name(path): numbers for path, numbers in axes if numbers is not None}
    no_maps = ("bias", "gain", "offset", "kernel", "share", "bonus", "skip", "log_decay", "log_step", "frequency")
    for weight, decays in mask.items():
        last = weight.rpartition(".")[2]
        assert not (decays and last.endswith(no_maps)), weight
        assert decays or last not in ("into", "out", "output", "value", "embedding", "position"), weight
    inside = {weight for weight, decays in mask.items() if decays and weight.startswith("layers.")}
    assert muons.keys() == inside
    # Of a stack of layers nothing is summed or made across layers.
    assert all(0 not in (*numbers.reduction_axis, *numbers.output_axis) for numbers in muons.values())


def test_muon_takes_scores_of_heads_one_by_one():
    config = ModelConfig(vocabulary=8, layers=2, width=8, heads=2, length=4, mixer=mixers.Synthesizer("trained"))
    axes = muon_axes(config).layers.attention
    assert axes["scores"] == optax.contrib.MuonDimensionNumbers((2,), (3,))
    assert axes["value"] == optax.contrib.MuonDimensionNumbers((1,), (2, 3))
    assert axes["output"] == optax.contrib.MuonDimensionNumbers((1, 2), (3,))


def test_adafactors_momentum_may_be_swept():
    config = ModelConfig(vocabulary=8, layers=1, width=8, heads=2, length=4)
    slope = ones_like(config)

    def update(momentum):
        settings = OptimizerSettings(name="adafactor", momentum=momentum, weight_decay=0.0)
        optimizer = from_settings(settings, config, steps=9)
        return optimizer.update(slope, optimizer.init(slope), slope)[0].embedding

    both = jax.vmap(update)(jnp.array([0.8, 0.9]))
    np.testing.assert_allclose(both, [update(0.8), update(0.9)], rtol=1e-6)


def random_like(tree, key):
    return jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), tree)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_adafactor_is_optaxs_on_whole_linear_maps_however_many_heads_they_give(momentum):
    config = ModelConfig(vocabulary=8, layers=2, width=128, heads=4, length=4, biases=True)
    settings = OptimizerSettings(
        name="adafactor", momentum=momentum, rate=0.1, weight_decay=0.0, clip=0.0, warm_up=0
    )
    optimizer = from_settings(settings, config, STEPS)
    published = optax.adafactor(
        lambda count: 0.1 * share_of_rate(count, settings, STEPS),
        multiply_by_parameter_scale=False,
        momentum=momentum or None,
    )
    flat = {"query": (2, 128, 128), "output": (2, 128, 128), "query_bias": (2, 4, 32)}
    parameters = initialize(config, jax.random.key(0))
    of = lambda tree: {name: getattr(tree.layers.attention, name) for name in flat}
    theirs = {name: x.reshape(flat[name]) for name, x in of(parameters).items()}
    state, their_state = optimizer.init(parameters), published.init(theirs)
    assert max(x.size for x in jax.tree.leaves(state[0][0].v.layers.attention)) == 2 * 128  # those of biases
    for key in jax.random.split(jax.random.key(1), 3):
        slope = random_like(parameters, key)
        update, state = optimizer.update(slope, state, parameters)
        their_slope = {name: x.reshape(flat[name]) for name, x in of(slope).items()}
        their_update, their_state = published.update(their_slope, their_state, theirs)
        for name, found in of(update).items():
            np.testing.assert_allclose(found.reshape(flat[name]), their_update[name], rtol=1e-6, err_msg=name)


def table_parameters():
    return ones_like(token_tables(5))


def one_step(optimizer, parameters):
    gradients = jax.tree.map(jnp.ones_like, parameters)
    update, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    return {name: np.asarray(value) for name, value in named(update).items()}


def test_each_of_the_two_rates_reaches_its_own_table():
    update = one_step(by_part(sgd, Rates(decoder=3.0, attention=0.5)), table_parameters())
    assert set(update) == {"layers.attention.table", "unembedding"}
    assert np.all(update["layers.attention.table"] == -0.5)
    assert np.all(update["unembedding"] == -3.0)


def test_in_a_full_model_the_attention_rate_reaches_the_weights_of_attention_alone():
    config = ModelConfig(vocabulary=5, length=4, layers=2, heads=2, width=4, feed_forward="relu", biases=True)
    update = one_step(by_part(sgd, Rates(decoder=3.0, attention=0.5)), ones_like(config))
    attention = {name for name in update if name.startswith("layers.attention.")}
    assert {"layers.attention.query", "layers.attention.output_bias"} <= attention
    assert "layers.attention_norm.gain" in update and "layers.attention_norm.gain" not in attention
    for name, value in update.items():
        assert np.all(value == (-0.5 if name in attention else -3.0)), name


def test_momentum_is_kept_apart_for_the_two_parts():
    optimizer = by_part(lambda rate: sgd(rate, 0.9), Rates(decoder=1.0, attention=2.0))
    parameters = table_parameters()
    state = optimizer.init(parameters)
    zero, one = (jax.tree.map(lambda x, v=v: jnp.full_like(x, v), parameters) for v in (0.0, 1.0))
    gradient = zero.replace(unembedding=one.unembedding)
    _, state = optimizer.update(gradient, state, parameters)
    update, _ = optimizer.update(zero, state, parameters)
    assert np.asarray(update.unembedding) == pytest.approx(-0.9)
    assert np.all(np.asarray(update.layers.attention.table) == 0)


def test_rates_may_be_traced_numbers_so_a_grid_is_one_vmap():
    parameters = table_parameters()

    def step(rates):
        optimizer = by_part(lambda rate: sgd(rate, 0.9), rates)
        gradients = jax.tree.map(jnp.ones_like, parameters)
        return optimizer.update(gradients, optimizer.init(parameters), parameters)[0]

    grid = Rates(decoder=jnp.array([1.0, 2.0, 3.0]), attention=jnp.array([0.1, 0.2, 0.3]))
    update = jax.jit(jax.vmap(step))(grid)
    assert np.array_equal(update.unembedding[:, 0, 0], -grid.decoder)
    assert np.array_equal(update.layers.attention.table[:, 0, 0, 0, 0], -grid.attention)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.cosine_decay_schedule(0.3, STEPS),
        optax.warmup_cosine_decay_schedule(0.0, 0.3, 4, STEPS, 0.01),
        optax.linear_schedule(0.3, 0.0, 5),
    ],
    ids=["cosine", "warm-up and cosine", "linear"],
)
def test_a_schedule_is_a_rate(schedule):
    weight, expected = START.copy(), []
    for t, gradient in enumerate(some_gradients()):
        weight = weight - float(schedule(t)) * gradient
        expected.append(weight)
    # Optax computes a schedule in float32: 12 steps of 0.3 times gradients below 3, each rate rounded a few times.
    assert trace(sgd(schedule), START, some_gradients()) == pytest.approx(np.array(expected), abs=3e-6)


def test_a_schedule_may_be_the_rate_of_one_part_alone():
    optimizer = by_part(sgd, Rates(decoder=optax.linear_schedule(1.0, 0.0, 2), attention=0.5))
    parameters = table_parameters()
    state = optimizer.init(parameters)
    gradients = jax.tree.map(jnp.ones_like, parameters)
    seen = []
    for _ in range(4):
        update, state = optimizer.update(gradients, state, parameters)
        seen.append((-float(update.unembedding[0, 0]), -float(update.layers.attention.table[0, 0, 0, 0])))
    assert seen == [(1.0, 0.5), (0.5, 0.5), (0.0, 0.5), (0.0, 0.5)]


def test_a_gradient_longer_than_the_limit_is_scaled_down_to_it():
    gradient = np.array([[3.0, 0.0, -4.0, 0.0]])
    step = trace(clipped(sgd(1.0), 0.5), np.zeros(4), gradient)
    assert step[0] == pytest.approx(-gradient[0] * 0.1, rel=1e-12)
    assert np.linalg.norm(step) == pytest.approx(0.5, rel=1e-12)


def test_a_gradient_within_the_limit_is_left_alone():
    gradient = np.array([[3.0, 0.0, -4.0, 0.0]])
    assert np.array_equal(trace(clipped(sgd(1.0), 5.5), np.zeros(4), gradient), -gradient)


def test_the_limit_is_on_all_weights_together():
    parameters = table_parameters()
    gradients = jax.tree.map(jnp.ones_like, parameters)
    optimizer = clipped(by_part(sgd, Rates(decoder=1.0, attention=1.0)), 0.1)
    update, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    assert float(optax.global_norm(update)) == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_not_above_zero_is_refused(norm):
    with pytest.raises(ValueError, match="the gradient norm to clip to is .*; it must be above 0"):
        clipped(sgd(1.0), norm)


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused_by_name(rate):
    with pytest.raises(ValueError, match=f"attention_rate is {rate}; a learning rate must be a finite number"):
        check_rates(decoder_rate=1.0, attention_rate=rate)


def test_a_rate_of_zero_is_allowed():
    check_rates(decoder_rate=0.0, attention_rate=0.5)


@pytest.mark.parametrize("name", get_args(OptimizerName))
def test_a_number_makes_a_difference_where_it_is_read_and_cannot_be_swept_elsewhere(name):
    parameters = initialize(MODEL, jax.random.key(0))
    turning = lambda n: jax.tree.map(lambda p: jnp.sin(100 * (n + 1) * (p + 1)), parameters)
    gradients = [turning(n) for n in range(4)]

    @jax.jit
    def after(numbers):
        settings = OptimizerSettings(name=name, schedule="constant", warm_up=0, **numbers)
        optimizer, weights = from_settings(settings, MODEL, STEPS), parameters
        state = optimizer.init(weights)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, weights)
            weights = optax.apply_updates(weights, updates)
        return weights

    base = {
        "rate": 0.1,
        "momentum": 0.9,
        "second_momentum": 0.9,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
        "muon_rate": 0.1,
    }
    usual = after(base)
    for number in base:
        other = after({**base, number: 0.3})
        changes = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), usual, other)
        assert any(jax.tree.leaves(changes)) == (name not in NOT_READ.get(number, ())), number
        sweep = {"optimizer": OptimizerSettings(name=name), "sweep": {f"optimizer.{number}": (0.1, 0.2)}}
        if name in NOT_READ.get(number, ()):
            with pytest.raises(ValueError, match=f"sweep.optimizer.{number} would train equal models: .*{name}"):
                TrainConfig(**sweep)
        else:
            TrainConfig(**sweep)
