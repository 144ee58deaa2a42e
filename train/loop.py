"""A run from its Config to its exit code: set up, train, report; the same Config again resumes."""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
import optax
from rich.console import Console

from zigzag_jax.models.sharding import Sharding, abstract_state, init_state
from zigzag_jax.train import metrics, report
from zigzag_jax.train.checkpoint import Checkpoints, check_identity
from zigzag_jax.train.config import Config, check
from zigzag_jax.train.data import Batches
from zigzag_jax.train.display import Display
from zigzag_jax.train.dry_run import describe
from zigzag_jax.train.errors import DONE, PREEMPTED, UserError
from zigzag_jax.train.mesh import make_mesh, start_devices
from zigzag_jax.train.metrics import MetricsLog
from zigzag_jax.train.models import fit_vocabulary, maker, model_config
from zigzag_jax.train.optim import optimizer, schedule
from zigzag_jax.train.packing import make_plan
from zigzag_jax.train.sample import continue_texts
from zigzag_jax.train.step import TrainState, abstract_train_state, make_step, state_shardings
from zigzag_jax.train.stop import StopRequest
from zigzag_jax.train.store import Dataset, open_dataset
from zigzag_jax.train.task import Task

_HELD_OUT_SEED = 0  # the held-out rows are the same whatever the run's seed
_PROMPT, _WRITTEN = 24, 72  # tokens of a prompt, tokens the model adds


@dataclass(frozen=True)
class Run:
    """All that is made once for a run."""

    config: Config
    dataset: Dataset
    mesh: jax.sharding.Mesh
    task: Task
    tx: optax.GradientTransformation
    abstract: TrainState
    """The state as shapes with shardings."""
    init: Callable[[], TrainState]
    """Draws the first state."""
    batches: Batches
    held_out: report.HeldOut
    losses: Callable[..., Any]
    """Jitted losses(params, batch)."""
    say: Callable[[str], None]


def run(config: Config) -> int:
    """Train to --steps and report; returns the exit code. UserError for what a person can mend."""
    check(config)
    sizes = model_config(config)
    console = Console(soft_wrap=True, quiet=config.hosts.process_id != 0)
    say = lambda text: console.print(text, highlight=False, markup=False)
    if config.dry_run:
        describe(config, sizes, say)
        return DONE
    start_devices(config)
    mesh = make_mesh(config)
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError("out", f"must be a folder that can be written ({error.strerror})", config.folder) from None
    with ExitStack() as stack:
        made = _set_up(config, sizes, mesh, stack, say)
        checkpoints = Checkpoints(config.folder / "checkpoints", config.keep, say)
        stack.callback(checkpoints.close)
        if (old := checkpoints.identity()) is not None:
            check_identity(old, identity(made))
        first, state = checkpoints.restore(made.abstract) or (0, made.init())
        _say_where(made, first)
        log = MetricsLog(config.folder if jax.process_index() == 0 else None)
        stack.callback(log.close)
        log.header(devices=mesh.size, mesh=dict(mesh.shape), resumed_from=first or None)
        if first < config.steps:
            display = Display(config.steps, first, console)
            stop = StopRequest()
            with display, stop:
                step, state = _train(made, checkpoints, log, display, stop, first, state)
            if step < config.steps:
                say(f"{stop.asked}: saved after step {step}. The same command again resumes there.")
                return PREEMPTED
        _report(made, state, log)
    return DONE


def _set_up(config: Config, sizes, mesh, stack: ExitStack, say) -> Run:
    dataset = open_dataset(config.data, config.tokenizer, process_index=jax.process_index(), say=say)
    sizes = fit_vocabulary(sizes, config.model, dataset.vocab_size)
    sharding = Sharding(mesh)
    make = maker(sizes, sharding, dtype=config.dtype, remat=config.remat)
    graphdef, shapes = abstract_state(make)
    tx = optimizer(config.optim, config.steps)
    task = Task(graphdef, sharding, jax.numpy.dtype(config.dtype), sizes.router_aux_loss_coef)

    def init() -> TrainState:
        params = init_state(make, sharding, jax.random.key(config.seed))[1]
        where = state_shardings(shapes, tx, sharding).opt_state
        return TrainState(params, jax.jit(tx.init, out_shardings=where)(params))

    train_plan = make_plan(dataset.train.lengths, config.seq_len, seed=config.seed)
    eval_plan = make_plan(dataset.held_out.lengths, config.seq_len, seed=_HELD_OUT_SEED)
    batches = stack.enter_context(Batches(dataset.train, train_plan, config.batch, mesh))
    held_out = stack.enter_context(Batches(dataset.held_out, eval_plan, config.batch, mesh, repeat=False))
    say(
        f"model {config.model}: {sum(x.size for x in jax.tree.leaves(shapes)) / 1e6:.2f} M parameters; "
        f"data: {len(dataset.train.tokens):,} tokens in rows of {config.seq_len}, {train_plan.fill:.1%} full"
    )
    return Run(
        config=config, dataset=dataset, mesh=mesh, task=task, tx=tx, init=init,
        abstract=abstract_train_state(shapes, tx, sharding),
        batches=batches, held_out=report.HeldOut(held_out), losses=jax.jit(task.losses), say=say,
    )  # fmt: skip


def identity(made: Run) -> dict[str, Any]:
    """What may not change when a run is resumed, by the name of its flag."""
    config, optim = made.config, dataclasses.asdict(made.config.optim)
    tokenizer = hashlib.sha256(made.dataset.tokenizer.to_str().encode()).hexdigest()[:16]
    fixed = {"model": config.model, "tokenizer": tokenizer, "data": made.dataset.digest, "seq-len": config.seq_len}
    fixed |= {"batch": config.batch, "seed": config.seed, "dtype": config.dtype}
    return fixed | {f"optim.{name.replace('_', '-')}": value for name, value in optim.items()}


def _say_where(made: Run, first: int) -> None:
    config, shape = made.config, " * ".join(f"{axis} {size}" for axis, size in made.mesh.shape.items())
    made.say(
        f"mesh {shape} on {made.mesh.size} {made.mesh.devices.flat[0].device_kind} devices; run in {config.folder}"
    )
    if first >= config.steps:
        made.say(f"resumed at step {first}: finished")
    elif first:
        made.say(f"resumed at step {first}; the learning rate follows the schedule of --steps {config.steps}")


def _train(
    made: Run, checkpoints: Checkpoints, log: MetricsLog, display: Display, stop: StopRequest, first: int, state
):
    """Steps first + 1 .. --steps, or until a stop is asked for; (last finished step, state), saved."""
    config = made.config
    train_step = jax.jit(make_step(made.task, made.tx), donate_argnums=0)
    rate, step = schedule(config.optim, config.steps), first
    for step in range(first + 1, config.steps + 1):
        begin = time.perf_counter()
        state, result = train_step(state, made.batches.at(step - 1))
        result = jax.device_get(result)  # waits: hundreds of steps in flight at once can hang CPU devices
        losses, speed = result.losses, float(result.losses.tokens) / (time.perf_counter() - begin)
        log.step(
            step, loss=float(losses.loss), aux_loss=float(losses.aux_loss), grad_norm=float(result.grad_norm),
            learning_rate=float(jax.device_get(rate(step - 1))), tokens_per_second=speed,
        )  # fmt: skip
        display.step(step, float(losses.loss), speed)
        stopping = stop.asked is not None and step < config.steps
        if step % config.save_every == 0 or step == config.steps or stopping:
            checkpoints.save(step, state, identity(made))
        if stopping:
            break
        if step % config.eval_every == 0 and step < config.steps:
            loss = made.held_out.loss(lambda batch: made.losses(state.params, batch))  # noqa: B023 (used at once)
            log.step(step, eval_loss=loss)
            display.say(f"step {step}: held-out loss {loss:.4f}")
    checkpoints.wait()
    return step, state


def _report(made: Run, state: TrainState, log: MetricsLog) -> None:
    """The end of a finished run."""
    config, say = made.config, made.say
    loss = made.held_out.loss(lambda batch: made.losses(state.params, batch))
    log.step(config.steps, eval_loss=loss)
    unigram, bigram = made.held_out.baselines(made.dataset)
    say(f"held-out loss {loss:.3f} nats a token; unigram model {unigram:.3f}, bigram model {bigram:.3f}")
    rows = made.mesh.shape["dp"] * made.mesh.shape["fsdp"]
    prompts = report.prompts(made.dataset, rows, min(_PROMPT, config.seq_len - 1))
    texts = continue_texts(made.task, state.params, prompts, _WRITTEN, seed=config.seed, temperature=0.7)
    decode = made.dataset.tokenizer.decode
    for prompt, text in list(zip(prompts, texts, strict=True))[:2]:
        say(f"\n--- given:\n{decode(prompt.tolist())}\n--- the model goes on:\n{decode(text[len(prompt) :].tolist())}")
    picture, numbers = config.folder / "loss.png", config.folder / metrics.FILE
    if jax.process_index() == 0:
        report.draw_loss(numbers, (unigram, bigram), picture)
    say(f"\nloss curve {picture}, numbers {numbers}, TensorBoard events {config.folder / 'tensorboard'}")
    say(f"To go on, give the same command with a larger --steps: it resumes from step {config.steps}.")
