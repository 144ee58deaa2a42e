"""A run from its Config to its exit code: train, save, report; the same Config again resumes."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from zigzag_jax.models.decode import write
from zigzag_jax.models.devices import use_cpu_without_gpu
from zigzag_jax.models.hf.saved import copy_companions
from zigzag_jax.models.progress import ByteBar
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.checkpoint import Checkpoints, check_identity
from zigzag_jax.train.config import Config, check
from zigzag_jax.train.data.mixture import shares
from zigzag_jax.train.dry_run import describe
from zigzag_jax.train.errors import DONE, PREEMPTED, RunError, UserError
from zigzag_jax.train.hosts.agree import call_roll, check_devices, facts
from zigzag_jax.train.hosts.discover import find_hosts
from zigzag_jax.train.hosts.link import Link
from zigzag_jax.train.hosts.watchdog import PATIENT, Watchdog
from zigzag_jax.train.logs import metrics, report
from zigzag_jax.train.logs.display import Display
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.observe import Observer
from zigzag_jax.train.logs.replay import save_batch
from zigzag_jax.train.logs.trace import Profile, profile_steps
from zigzag_jax.train.logs.wandb_run import check_wandb, start_wandb
from zigzag_jax.train.mesh import join, make_mesh, start_devices
from zigzag_jax.train.models import model_config, model_folder
from zigzag_jax.train.optim import schedule
from zigzag_jax.train.origin import origin
from zigzag_jax.train.saving import Saver
from zigzag_jax.train.setup import Run, set_up
from zigzag_jax.train.step import StepMetrics, TrainState
from zigzag_jax.train.stop import Stopped, StopRequest

_PROMPT, _WRITTEN = 24, 72  # tokens of a prompt, tokens the model adds


def run(config: Config) -> int:
    """Train to --steps and report; returns the exit code. UserError for what a person can mend, else RunError."""
    check(config)
    check_wandb(config.wandb)
    hosts, found = find_hosts(config.hosts, os.environ)
    config = dataclasses.replace(config, hosts=hosts)
    sizes = model_config(config)
    if (source := model_folder(config)) is not None and source.resolve() == config.folder.resolve():
        raise UserError("out", "must be another folder than the model's", config.folder)
    console = Console(soft_wrap=True, quiet=hosts.process_id != 0)
    say = lambda text: console.print(text, highlight=False, markup=False)
    use_cpu_without_gpu()
    if config.dry_run:
        describe(config, sizes, say)
        return DONE
    start_devices(config)
    with ExitStack() as last, ExitStack() as stack:  # `last`: signals are heeded until all else is closed
        link = _join(config, found, stack, say)
        watchdog = stack.enter_context(Watchdog(config.folder, config.hosts.timeout, link))
        return _run(config, sizes, console, say, watchdog, last)


def _join(config: Config, found: str, stack: ExitStack, say: Callable[[str], None]) -> Link | None:
    """The wire to the other processes, where there are any."""
    hosts = config.hosts
    if hosts.num_processes == 1:
        return None
    say(f"process {hosts.process_id} of {hosts.num_processes}, coordinator {hosts.coordinator} (from {found})")
    link = stack.enter_context(call_roll(config, facts(config)))
    say(f"all processes are there and run the same: {', '.join(map(link.name, range(min(len(link.hosts), 16))))}")
    join(hosts)
    return link


def _run(
    config: Config, sizes: ModelConfig, console: Console, say: Callable[[str], None], watchdog: Watchdog,
    last: ExitStack,
) -> int:  # fmt: skip
    """Train and report, with the devices there."""
    source = model_folder(config)
    if watchdog.link is not None:
        check_devices(jax.devices(), watchdog.link.hosts)
    mesh = make_mesh(config)
    watchdog.on(mesh)
    with _writable(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        this = set_up(config, sizes, mesh, stack, say)
        with _writable(config.folder):
            checkpoints = Checkpoints(config.folder / "checkpoints", config.keep, say)
        stack.callback(checkpoints.close)
        if (old := checkpoints.identity()) is not None:
            check_identity(old, this.identity)
        if jax.process_index() == 0:  # beside the checkpoints, for an export; not before this run may write here
            with _writable(config.folder):
                if source is not None:
                    copy_companions(source, config.folder)
                shutil.copyfile(this.dataset.folder / "tokenizer.json", config.folder / "tokenizer.json")
        with ByteBar("reading weights", "read", console) as told:
            first, state = checkpoints.restore(this.abstract) or (0, this.init(told))
        step, stop = first, last.enter_context(StopRequest(say, watchdog.link))
        _say_where(this, first)
        mine = config.folder if jax.process_index() == 0 else None
        with _writable(config.folder):
            log = MetricsLog(mine, first, start_wandb(config.wandb, mine, this.identity), say)
            stack.callback(log.close)
            log.header(devices=mesh.size, mesh=dict(mesh.shape), resumed_from=first or None)
        if first < config.steps:
            with Display(config.steps, first, console) as display:
                profile = stack.enter_context(Profile(profile_steps(config.profile), mine, display.say))
                observer = Observer(this.sizes, this.batches, mesh, profile)
                step, state = _train(this, checkpoints, log, display, stop, watchdog, observer, (first, state))
            if step < config.steps:
                say(f"{stop.asked}: saved after step {step}. The same command again resumes there.")
                return PREEMPTED
        watchdog.doing(step, "writing the report after step", PATIENT)
        try:
            _report(this, step, state, log, stop.parts(step))
        except Stopped:
            say(f"{stop.asked}: the weights are saved after step {step}. The same command again writes the report.")
            return PREEMPTED
    return DONE


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError("out", f"must be a folder that can be written ({error.strerror})", folder) from None


def _say_where(this: Run, first: int) -> None:
    config, shape = this.config, " * ".join(f"{axis} {size}" for axis, size in this.mesh.shape.items())
    kind = this.mesh.devices.flat[0].device_kind
    shape += f" (ep {config.mesh.ep} over {', '.join(axes)})" if (axes := this.task.sharding.expert_axes) else ""
    this.say(f"mesh {shape} on {this.mesh.size} {kind} devices; run in {config.folder}")
    if first >= config.steps:
        this.say(f"resumed at step {first}: finished")
    elif first:
        this.say(f"resumed at step {first}; the learning rate follows the schedule of --steps {config.steps}")


def _train(
    this: Run, checkpoints: Checkpoints, log: MetricsLog, display: Display, stop: StopRequest, watchdog: Watchdog,
    observer: Observer,
    begin: tuple[int, TrainState],
) -> tuple[int, TrainState]:  # fmt: skip
    """Steps up to --steps, or until a stop is asked for; (last finished step, state), saved."""
    config, (step, state) = this.config, begin
    rate = schedule(config.optim, config.steps)
    about = (this.identity, this.config_json, origin(config))
    saver = Saver(checkpoints, config.save_every, about, display.say, alone=watchdog.link is None)
    saving = lambda: watchdog.doing(step, "saving after step", PATIENT)
    program = None
    while step < config.steps:
        times = PATIENT if step == begin[0] else 1
        watchdog.doing(step + 1, "reading the batch of step", times)
        observer.begin(step + 1)
        batch = this.batches.at(step)
        observer.timer.data_ready()
        watchdog.doing(step + 1, "computing step", times)
        if program is None:
            program = observer.profile.program = this.step.lower(state, batch).compile()
        state, result = program(state, batch)
        result = jax.device_get(result)  # waits: hundreds of steps in flight at once can hang CPU devices
        observer.finished(step + 1)
        learning_rate = float(jax.device_get(rate(step)))
        step += 1
        _check_finite(step, result, checkpoints.newest_said, partial(save_batch, config.folder, step, batch))
        losses = result.losses
        seen = observer.values(step, float(losses.tokens))
        seen |= {"z_loss": float(losses.z_loss)} if config.optim.z_loss else {}
        log.step(
            step, loss=float(losses.loss), aux_loss=float(losses.aux_loss), grad_norm=float(result.grad_norm),
            learning_rate=learning_rate, expert_load=_uneven(losses.load), **seen,
        )  # fmt: skip
        display.step(step, float(losses.loss), seen["tokens_per_second"])
        stopping = stop.after(step) and step < config.steps
        saving()
        saver.after(step, state, now=stopping or step == config.steps)
        if stopping:
            break
        if step % config.eval_every == 0 and step < config.steps:
            watchdog.doing(step, "evaluating after step", PATIENT)
            loss = this.held_out.loss(this.losses, state.params)
            log.step(step, eval_loss=loss)
            display.say(f"step {step}: held-out loss {loss:.4f}")
    saver.finish(step, state, saving)
    return step, state


def _uneven(load: np.ndarray) -> float:
    """The busiest expert's share of its layer's tokens, as a multiple of an even share; 1 without experts."""
    even = load.mean(axis=1, keepdims=True)
    return float(np.max(load / np.maximum(even, 1.0), initial=1.0 if load.size == 0 else 0.0))


def _check_finite(step: int, result: StepMetrics, newest: Callable[[], str], keep: Callable[[], str]) -> None:
    for name, value in (("loss", result.losses.loss), ("gradient norm", result.grad_norm)):
        if not math.isfinite(value):
            raise RunError(f"step {step}: the {name} is {float(value)}, training stops; {newest()}; {keep()}")


def _report(this: Run, step: int, state: TrainState, log: MetricsLog, part: Callable[[], None]) -> None:
    """The end of a finished run; `part` is called after each part that needs all processes."""
    config, say = this.config, this.say
    loss = this.held_out.loss(this.losses, state.params, part)
    log.step(step, eval_loss=loss)
    for line in shares(this.dataset.train, this.batches.plan, step * config.batch):
        say(line)
    unigram, bigram = this.held_out.baselines(this.dataset)
    say(f"held-out loss {loss:.3f} nats a token; unigram model {unigram:.3f}, bigram model {bigram:.3f}")
    prompts = report.prompts(this.dataset, 2, min(_PROMPT, config.seq_len - 1)).tolist()
    told = lambda tokens: part()
    texts = write(this.writer, state.params, prompts, _WRITTEN, seed=config.seed, temperature=0.7, told=told)
    decode = this.dataset.tokenizer.decode
    for prompt, text in zip(prompts, texts, strict=True):
        say(f"\n--- given:\n{decode(prompt)}\n--- the model goes on:\n{decode(text)}")
    picture, numbers = config.folder / "loss.png", config.folder / metrics.FILE
    if jax.process_index() == 0:
        report.draw_loss(numbers, (unigram, bigram), picture)
    say(f"\nloss curve {picture}, numbers {numbers}, TensorBoard events {config.folder / 'tensorboard'}")
    say(f"To go on, give the same command with a larger --steps: it resumes from step {step}.")
