"""A run built from its Config: data, mesh, model, optimiser, all that is made once before the first step."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from zigzag_jax.models.decode import Writer
from zigzag_jax.models.progress import Told
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.config import Config
from zigzag_jax.train.data.batches import Batches
from zigzag_jax.train.data.dataset import Dataset
from zigzag_jax.train.data.mixture import plan_rows, shares
from zigzag_jax.train.data.open_data import open_data
from zigzag_jax.train.data.packing import cut_count
from zigzag_jax.train.data.plan_file import kept_plan
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.hosts.watchdog import PATIENT
from zigzag_jax.train.identity import identity_of
from zigzag_jax.train.logs.report import HeldOut
from zigzag_jax.train.models import config_json, first_parameters, fit_vocabulary, maker, tokenizer_file
from zigzag_jax.train.program import make_program
from zigzag_jax.train.step import TrainState, state_shardings
from zigzag_jax.train.task import Losses, Task

_HELD_OUT_SEED = 0  # the held-out rows are the same whatever the run's seed


@dataclass(frozen=True)
class Run:
    """All that is made once for a run."""

    config: Config
    """What it was told."""
    identity: dict[str, Any]
    """What may not change when it is resumed, by the name of its flag."""
    sizes: ModelConfig
    """The model's sizes."""
    config_json: dict[str, Any]
    """The model's config.json."""
    dataset: Dataset[Tokens]
    """Its text."""
    mesh: Mesh
    """Its devices."""
    task: Task
    """Its model and loss."""
    step: jax.stages.Wrapped
    """Jitted step(state, batch) -> (state, metrics)."""
    abstract: TrainState
    """Its state as shapes with shardings."""
    init: Callable[[Told], TrainState]
    """The first state, drawn or read; gets who is told how much is read."""
    batches: Batches
    """What it trains on."""
    held_out: HeldOut
    """What it is scored on."""
    writer: Writer
    """Its model, to be heard."""
    losses: Callable[..., Losses]
    """Jitted losses(params, batch)."""
    say: Callable[[str], None]
    """Prints a line, in process 0."""


def set_up(
    config: Config, sizes: ModelConfig, mesh: Mesh, stack: ExitStack, say: Callable[[str], None],
    doing: Callable[[str], None] = lambda what: None,
) -> Run:  # fmt: skip
    """Build the run; what has to be closed at its end goes on `stack`. UserError for data or a tokenizer that won't
    do.

    `doing` is told what is being made, again while it moves: a watchdog that hears it need not wait for the whole.
    """
    reading = lambda: doing("reading the data")
    reading()
    dataset = open_data(
        config.data, tokenizer_file(config), process_index=jax.process_index(), say=say, working=reading,
        wait_s=PATIENT * config.hosts.timeout,
    )  # fmt: skip
    doing("preparing the model")
    sizes = fit_vocabulary(sizes, config.model, dataset.vocab_size)
    program = make_program(config, sizes, mesh)
    task, tx, shapes = program.task, program.tx, program.parameters
    sharding = task.sharding
    if config.accumulate > 1 and task.counts_first:
        say(
            "accumulate: aux loss hf counts experts in a forward pass of its own; --router.aux-loss sequence needs none"
        )
    if config.router.bias_rate > 0:
        say("router biases: this run's checkpoints cannot be exported for transformers, which has no place for them")

    def init(told: Told) -> TrainState:
        params = first_parameters(config, sizes, shapes, sharding, told)
        where = state_shardings(shapes, tx, sharding).opt_state
        return TrainState(params, jax.jit(tx.init, out_shardings=where)(params))

    count = config.accumulate
    doing("packing the rows")
    kept = functools.partial(kept_plan, say=say)
    train_plan = plan_rows(dataset.train, config.seq_len, seed=config.seed, make=kept)
    eval_plan = plan_rows(dataset.held_out, config.seq_len, seed=_HELD_OUT_SEED, make=kept)
    batches = stack.enter_context(Batches(dataset.train, train_plan, config.batch, mesh, accumulate=count))
    held_out = stack.enter_context(Batches(dataset.held_out, eval_plan, config.batch // count, mesh, repeat=False))
    say(
        f"model {config.model}: {sum(x.size for x in jax.tree.leaves(shapes)) / 1e6:.2f} M parameters; "
        f"data: {dataset.train.size:,} tokens in rows of {config.seq_len}, {train_plan.fill:.1%} full"
    )
    lengths = dataset.train.lengths
    long, cuts = cut_count(lengths, config.seq_len)
    say(f"{long:,} of {len(lengths):,} documents are longer than a row: cut into {cuts:,} pieces")
    scored = HeldOut(held_out, count)
    for line in shares(dataset.train, train_plan, config.steps * config.batch):
        say(f"in {config.steps} steps, {line}")
    for line in shares(dataset.held_out, eval_plan, scored.rows):
        say(f"in the held-out loss, of {scored.rows} rows, {line}")
    return Run(
        config=config,
        identity=identity_of(config, sizes, dataset),
        sizes=sizes,
        config_json=config_json(config, sizes, dataset.end_of_document),
        dataset=dataset,
        mesh=mesh,
        task=task,
        step=program.step,
        abstract=program.state,
        init=init,
        batches=batches,
        held_out=scored,
        writer=Writer(lambda sharding: maker(config, sizes, sharding), sharding),
        losses=jax.jit(task.losses),
        say=say,
    )
