"""A run from its Config to its exit code; the same Config again resumes.

    check, join        what is wrong without any device is found first; several processes find each other
    sole_run           no other run has the folder                                              lock.py
    set_up             data, model and program                                                  setup.py
    begin              the folder, the newest checkpoint or first weights                       begin.py
    train              the loop over the steps                                                  steps.py
    report             held-out loss, what the model writes                                     ending.py

What has to be closed lies on a stack, so that it is closed however the run ends.
"""

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack

import jax
from rich.console import Console

from zigzag_jax.models.devices import use_cpu_without_gpu
from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.begin import first_state, open_checkpoints, open_log, say_where, writable
from zigzag_jax.train.config import Config, check
from zigzag_jax.train.dry_run import describe
from zigzag_jax.train.ending import report
from zigzag_jax.train.errors import DONE, PREEMPTED, UserError
from zigzag_jax.train.hosts.agree import check_devices, facts
from zigzag_jax.train.hosts.discover import find_hosts
from zigzag_jax.train.hosts.meet import meet
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.hosts.watchdog import PATIENT, Watchdog
from zigzag_jax.train.lock import sole_run
from zigzag_jax.train.logs.display import Display
from zigzag_jax.train.logs.trace import Profile, profile_steps
from zigzag_jax.train.logs.wandb_run import check_wandb
from zigzag_jax.train.mesh import make_mesh, start_devices
from zigzag_jax.train.models import model_config, model_folder
from zigzag_jax.train.setup import set_up
from zigzag_jax.train.steps import Steps
from zigzag_jax.train.stop import Stopped, StopRequest


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
        link = meet(config, facts(config), found, stack, say) if config.hosts.num_processes > 1 else None
        watchdog = stack.enter_context(Watchdog(config.folder, config.hosts.timeout, link))
        return _run(config, sizes, console, say, watchdog, last)


def _run(
    config: Config, sizes: ModelConfig, console: Console, say: Callable[[str], None], watchdog: Watchdog,
    last: ExitStack,
) -> int:  # fmt: skip
    """Train and report, with the devices there."""
    if watchdog.link is not None:
        check_devices(jax.devices(), watchdog.link.hosts)
    mesh = make_mesh(config)
    watchdog.on(mesh)
    preparing = lambda what: watchdog.doing(0, f"{what} before step", PATIENT)
    with writable(config.folder):
        config.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with writable(config.folder):
            waiting = Together(moving=lambda: preparing("waiting for the folder"))
            stack.enter_context(sole_run(config.folder, waiting, say))
        this = set_up(config, sizes, mesh, stack, say, preparing)
        checkpoints = open_checkpoints(this, stack, preparing)
        step, state = first_state(this, checkpoints, console, preparing)
        stop = last.enter_context(StopRequest(say, watchdog.link))
        watchdog.doing(step, "starting after step", PATIENT)
        say_where(this, step)
        log = open_log(this, step, stack)
        if step < config.steps:
            mine = config.folder if jax.process_index() == 0 else None
            with Display(config.steps, step, console) as display:
                profile = stack.enter_context(Profile(profile_steps(config.profile), mine, display.say))
                steps = Steps(this, checkpoints, log, display, stop, watchdog, profile)
                step, state = steps.train(step, state)
            if step < config.steps:
                say(f"{stop.asked}: saved after step {step}. The same command again resumes there.")
                return PREEMPTED
        try:
            report(this, step, state, log, _parts(stop, watchdog, step))
        except Stopped:
            say(f"{stop.asked}: the weights are saved after step {step}. The same command again writes the report.")
            return PREEMPTED
    return DONE


def _parts(stop: StopRequest, watchdog: Watchdog, step: int) -> Callable[[], None]:
    """What the report calls after each of its parts: it moves, and may be asked to stop there."""
    stop_here = stop.parts(step)

    def part() -> None:
        watchdog.doing(step, "writing the report after step", PATIENT)
        stop_here()

    watchdog.doing(step, "writing the report after step", PATIENT)
    return part
