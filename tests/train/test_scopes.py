"""A trace summed up by scopes: of a real trace on a CPU, and of launches made by hand."""

import doctest
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from zigzag_jax import models, train
from zigzag_jax.hlo import Program
from zigzag_jax.train.logs import scopes
from zigzag_jax.train.logs.scopes import MOVES, OTHER, SCOPES, UNKNOWN, Launch, by_scope, launches, table
from zigzag_jax.train.logs.timeline import split

STEP = (
    "HloModule jit_step, is_scheduled=true\n\n"
    "ENTRY %main (p: f32[4]) -> f32[4] {\n"
    "  %p = f32[4]{0} parameter(0)\n"
    '  %ar = f32[4]{0} all-reduce(%p), metadata={op_name="jit(step)/transpose(jvp())/mlp/psum"}\n'
    '  ROOT %sum = f32[4]{0} add(%ar, %p), metadata={op_name="jit(step)/optimizer/add"}\n'
    "}\n"
)


@pytest.fixture(scope="module")
def step():
    """A compiled gradient of two scanned, recomputed layers."""

    @jax.checkpoint
    def layer(x, w):
        with jax.named_scope("mlp"), jax.named_scope("experts"):
            return jnp.tanh(x @ w), None

    def loss(w, x):
        x, _ = jax.lax.scan(layer, x, w)
        with jax.named_scope("loss"):
            return jnp.sum(jnp.exp(x))

    w, x = jnp.full((2, 256, 256), 0.01), jnp.ones((256, 256))
    return jax.jit(jax.grad(loss)).lower(w, x).compile(), w, x


def test_a_real_trace(step, tmp_path: Path):
    compiled, w, x = step
    with jax.profiler.trace(tmp_path):
        compiled(w, x).block_until_ready()
        jnp.sort(x).block_until_ready()  # of another program
    program = Program(compiled.as_text())
    found = launches(tmp_path)
    seconds = by_scope(program, found)
    for name in scopes.PASSES:
        assert seconds["mlp/experts", name] > 0
    assert {scope for scope, _ in seconds} <= {"mlp/experts", "loss", OTHER, UNKNOWN}
    loops = [x for x in found if x.module == program.name and x.instruction.startswith("while")]
    others = [x for x in found if x.module != program.name]
    assert len(loops) == 2
    assert others
    # neither other programs nor the loops, in which everything else runs, are counted
    want = sum(x.seconds for x in found) - sum(x.seconds for x in [*loops, *others])
    assert sum(seconds.values()) == pytest.approx(want)
    inside = [x for x in found if x.module == program.name]
    whole = max(x.start + x.seconds for x in inside) - min(x.start for x in inside)
    assert 0 < sum(split(program, found)) <= whole * 1.001  # without the loops, which may begin before the rest
    assert split(program, found).computing > 0 == split(program, found).exposed
    assert len({x.device for x in inside}) == 1


def test_what_moves_data_and_what_nobody_knows():
    program = Program(STEP)
    made = [("jit_step", "ar", 3.0), ("jit_step", "sum", 2.0), ("jit_step", "graph", 1.0), ("jit_g", "sum", 9.0)]
    seconds = by_scope(program, [Launch(*launch) for launch in made])
    assert seconds == {(MOVES, "backward"): 3.0, ("optimizer", "forward"): 2.0, (UNKNOWN, "forward"): 1.0}
    assert [line.split() for line in table(seconds, devices=2, steps=5)] == [
        ["ms", "a", "step", "and", "device", "forward", "recomputed", "backward", "of", "launches"],
        ["between", "devices", "300.000", "50.0%"],
        ["optimizer", "200.000", "33.3%"],
        ["not", "named", "100.000", "16.7%"],
    ]
    assert table({}, 1, 1) == ["the trace names no launch of the step"]


def test_shares_of_launches_beside_each_other_add_up_to_all_of_them():
    """Two streams, each busy for the whole second: 2 s of launches, each half of them."""
    made = [Launch("jit_step", "ar", 1.0, 5.0, "gpu"), Launch("jit_step", "sum", 1.0, 5.0, "gpu")]
    rows = [line.split() for line in table(by_scope(Program(STEP), made), devices=1, steps=1)[1:]]
    assert [row[-1] for row in rows] == ["50.0%", "50.0%"]
    assert sum(split(Program(STEP), made)) == 1.0


def test_every_scope_of_the_source_has_its_row():
    text = "".join(
        path.read_text()
        for package in (models, train)
        for folder in package.__path__
        for path in Path(folder).rglob("*.py")
    )
    named = set(re.findall(r'jax\.named_scope\("(\w+)"\)', text))
    assert named - {"micro_batches"} == set(SCOPES)  # which is around all of a step


def test_the_examples():
    assert doctest.testmod(scopes).failed == 0
