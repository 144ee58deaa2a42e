"""The whole of training is the same function on every mesh: losses, gradients and the weights after five steps."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from zigzag_jax.layout import padded, to_zigzag
from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.sharding import abstract_state, init_state
from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig, RouterConfig
from zigzag_jax.train.mesh import make_sharding
from zigzag_jax.train.models import fit_vocabulary, maker
from zigzag_jax.train.optim import optimizer
from zigzag_jax.train.step import TrainState, abstract_train_state, make_step, state_shardings
from zigzag_jax.train.task import Task

RATE = 1e-3  # of the routers' biases
S, B, V, STEPS = 44, 4, 64, 5  # padded to 48 on cp 3 and 4, so that a pad that counts shows
# wide weights, so that no token stands between two experts: a routing that flips with rounding is not what is tested
QWEN, DEEPSEEK = "tiny-qwen3-moe", "tiny-deepseek-v2"
SIZES = {
    name: dataclasses.replace(fit_vocabulary(PRESETS[name], name, V), initializer_range=0.1)
    for name in (QWEN, DEEPSEEK)
}
# one layer, with experts: compile time is what these tests take
SIZES[DEEPSEEK] = dataclasses.replace(SIZES[DEEPSEEK], num_hidden_layers=1, first_k_dense_replace=0)
PADS = {"tokens": 0, "labels": -1, "positions": 0, "real": False}
QUICK = {"xla_backend_optimization_level": 0}


def make_mesh(dp: int, fsdp: int, cp: int) -> Mesh:
    devices = jax.devices()[: dp * fsdp * cp]
    return jax.make_mesh((dp, fsdp, cp), ("dp", "fsdp", "cp"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def natural_batch(packed: bool, step: int) -> dict[str, np.ndarray]:
    """Random rows [B, S]; packed ones hold documents of other lengths in each row and end in pads."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    labels = np.append(tokens[:, 1:], np.full((B, 1), -1), axis=1).astype(np.int32)
    positions, real = np.tile(np.arange(S, dtype=np.int32), (B, 1)), np.ones((B, S), bool)
    batch = {"tokens": tokens, "labels": labels, "positions": positions, "real": real}
    for b in range(B if packed else 0):
        *cuts, end = np.sort(rng.choice(np.arange(1, S), 4, replace=False))
        for cut in cuts:
            positions[b, cut:] = np.arange(S - cut)
            labels[b, cut - 1] = -1
        labels[b, end - 1] = -1
        for name, x in batch.items():
            x[b, end:] = PADS[name]
    return batch


def on_mesh(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    cp, where = mesh.shape["cp"], NamedSharding(mesh, P(("dp", "fsdp"), "cp"))

    def put(name: str, x: np.ndarray) -> jax.Array:
        x = np.pad(x, ((0, 0), (0, padded(S, cp) - S)), constant_values=PADS[name])
        return jax.device_put(to_zigzag(x, cp), where)

    return {name: put(name, x) for name, x in batch.items()}


@functools.cache
def program(axes: tuple[int, int, int], ep: int, micro: int = 1, name: str = QWEN) -> SimpleNamespace:
    """A compiled step on a mesh, where it begins, and its state as shapes with shardings."""
    mesh, sizes = make_mesh(*axes), SIZES[name]
    config = Config(mesh=MeshConfig(*axes[:2], ep, axes[2]))
    sharding = make_sharding(config, sizes, mesh)
    make = maker(Config(router=RouterConfig(bias_rate=RATE)), sizes, sharding)
    graphdef, shapes = abstract_state(make)
    task = Task(graphdef, sharding, jnp.dtype("float32"), "sequence", aux_coefficient=0.1)  # large: an error must show
    tx = optimizer(OptimConfig(warmup=2, learning_rate=1e-3), STEPS)
    params = init_state(make, sharding, jax.random.key(3))[1]
    opt_state = jax.jit(tx.init, out_shardings=state_shardings(shapes, tx, sharding).opt_state)(params)
    step = jax.jit(make_step(task, tx, RATE, micro), compiler_options=QUICK)

    def run(state: TrainState, n: int, packed: bool):
        batch = natural_batch(packed, n % (STEPS - 1))  # the last sees the first's batch
        state, result = step(state, on_mesh(batch, mesh))
        return state, jax.device_get(result)

    first, abstract = TrainState(params, opt_state), abstract_train_state(shapes, tx, sharding)
    return SimpleNamespace(run=run, first=first, abstract=abstract)


def flat(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@functools.cache
def train(axes: tuple[int, int, int], ep: int, micro: int = 1, name: str = QWEN) -> dict[bool, SimpleNamespace]:
    """Five steps, of unpacked and of packed rows, by one compiled program; `micro` micro-batches a step."""
    made = program(axes, ep, micro, name)

    def run(packed: bool) -> SimpleNamespace:
        state, losses, grads = made.first, [], []
        for n in range(STEPS):
            state, result = made.run(state, n, packed)
            losses.append(result)
            # after one step the first moment is the gradient, but for the factor (1 - b1) and the clipping
            grads = grads or flat(optax.tree.get(state.opt_state, "mu"))
        return SimpleNamespace(losses=losses, grads=grads, weights=flat(state.params), before=flat(made.first.params))

    return {packed: run(packed) for packed in (False, True)}


MESHES = [(QWEN, (1, 1, 4), 1, 1), (QWEN, (2, 2, 2), 4, 1)]
MORE = [(QWEN, (1, 1, 3), 1, 1), (QWEN, (1, 2, 2), 1, 2), (DEEPSEEK, (2, 2, 2), 4, 1)]
CASES = [
    pytest.param(
        name, axes, ep, micro, id=f"{name}-dp{axes[0]}-fsdp{axes[1]}-cp{axes[2]}-ep{ep}-micro{micro}", marks=marks
    )
    for meshes, marks in ((MESHES, ()), (MORE, pytest.mark.slow))
    for name, axes, ep, micro in meshes
]


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
@pytest.mark.parametrize(("name", "axes", "ep", "micro"), CASES)
def test_every_mesh_is_one_device(name: str, axes: tuple[int, int, int], ep: int, micro: int, packed: bool):
    one, other = train((1, 1, 1), 1, 1, name)[packed], train(axes, ep, micro, name)[packed]
    for a, b in zip(one.losses, other.losses, strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5), b, a)
    for a, b in zip(one.grads, other.grads, strict=True):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)  # 4e-6 is usual; a missing sum over cp gives 0.5
    # AdamW divides by the root of the second moment, so a gradient near zero makes noise of the size of a step
    moved = np.sqrt(sum(np.sum((w - b) ** 2) for w, b in zip(one.weights, one.before, strict=True)))
    apart = np.sqrt(sum(np.sum((w - b) ** 2) for w, b in zip(one.weights, other.weights, strict=True)))
    assert apart <= 1e-2 * moved


@pytest.mark.slow
def test_a_run_resumes_with_another_ep(tmp_path: Path):
    """Two steps with the experts over four devices, saved, and the rest on one: the run that never moved."""
    apart, whole, want = program((2, 2, 2), 4), program((1, 1, 1), 1), train((1, 1, 1), 1)[False]
    state = apart.first
    for n in range(2):
        state, _ = apart.run(state, n, False)
    checkpoints = Checkpoints(tmp_path, keep=1, say=print)
    try:
        checkpoints.save(2, state, {}, {}, {})
        checkpoints.wait()
        for made, devices in ((whole, 1), (apart, 8)):  # to one device, and back to the experts' owners
            step, read = checkpoints.restore(made.abstract) or pytest.fail("nothing restored")
            for a, b in zip(flat(state), flat(read), strict=True):
                np.testing.assert_array_equal(a, b)
            assert {len(x.sharding.device_set) for x in jax.tree.leaves(read.params)} == {devices}
            _, result = made.run(read, step, False)
            np.testing.assert_allclose(result.losses.loss, want.losses[2].losses.loss, rtol=2e-5)
    finally:
        checkpoints.close()


def test_a_batch_seen_again_costs_less():
    run = train((1, 1, 4), 1)[False]
    assert all(np.any(w != b) for w, b in zip(run.weights, run.before, strict=True))
    assert run.losses[-1].losses.loss < run.losses[0].losses.loss
