"""How a run begins, once it is set up: its folder is opened, its state found or made, and what it does is said.

Nothing is written into the folder before it is known that this run may: checkpoints of another run are refused first.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from rich.console import Console

from zigzag_jax.models.hf.saved import copy_companions
from zigzag_jax.models.progress import ByteBar
from zigzag_jax.train.checkpoint import Checkpoints
from zigzag_jax.train.errors import refusal
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.identity import check_identity
from zigzag_jax.train.logs.metrics import MetricsLog
from zigzag_jax.train.logs.trace import profile_steps
from zigzag_jax.train.logs.wandb_run import start_wandb
from zigzag_jax.train.models import model_folder
from zigzag_jax.train.setup import Run
from zigzag_jax.train.step import TrainState


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """What the system refuses inside is a folder that the user has to change: UserError. MachineError where the storage
    may come back.
    """
    try:
        yield
    except OSError as error:
        raise refusal(error, "out", f"must be a folder that can be written ({error.strerror})", folder) from None


def open_checkpoints(this: Run, stack: ExitStack, doing: Callable[[str], None]) -> Checkpoints:
    """The checkpoints of the run, closed by `stack`; beside them what an export needs. `doing` as set_up has it.

    UserError where they are those of another run, or the folder cannot be written.
    """
    folder, source = this.config.folder, model_folder(this.config)
    with writable(folder):
        together = Together(moving=lambda: doing("reading the checkpoint"))
        checkpoints = Checkpoints(folder / "checkpoints", this.config.keep, this.say, together=together)
    stack.callback(checkpoints.close)
    check_identity(checkpoints.folder, this.identity, together, checkpoints.tell)
    if jax.process_index() == 0:  # now that all agree that the folder is this run's
        checkpoints.remove_parts()
        with writable(folder):
            if source is not None:
                copy_companions(source, folder)
            shutil.copyfile(this.dataset.folder / "tokenizer.json", folder / "tokenizer.json")
    return checkpoints


def first_state(
    this: Run, checkpoints: Checkpoints, console: Console, doing: Callable[[str], None]
) -> tuple[int, TrainState]:
    """(finished steps, state) of the newest checkpoint, or of a new run; `doing` as set_up has it."""
    doing("reading the checkpoint")
    if (found := checkpoints.restore(this.abstract)) is not None:
        return found
    doing("making the weights")
    with ByteBar("reading weights", "read", console) as bar:

        def told(done: int, total: int) -> None:
            bar(done, total)
            doing("reading the weights")  # a slow disk is no hang

        return 0, this.init(told)


def open_log(this: Run, first: int, stack: ExitStack) -> MetricsLog:
    """Where the numbers go after `first` finished steps, closed by `stack`, with the line that begins this start."""
    config = this.config
    mine = config.folder if jax.process_index() == 0 else None
    with writable(config.folder):
        log = MetricsLog(mine, first, start_wandb(config.wandb, mine, this.identity, this.say), this.say)
        stack.callback(log.close)
        log.header(devices=this.mesh.size, mesh=dict(this.mesh.shape), resumed_from=first or None)
    return log


def say_where(this: Run, first: int) -> None:
    """Say on which devices the run goes on, and from where."""
    config, shape = this.config, " * ".join(f"{axis} {size}" for axis, size in this.mesh.shape.items())
    kind = this.mesh.devices.flat[0].device_kind
    shape += f" (ep {config.mesh.ep} over {', '.join(axes)})" if (axes := this.task.sharding.expert_axes) else ""
    this.say(f"mesh {shape} on {this.mesh.size} {kind} devices; run in {config.folder}")
    if (traced := profile_steps(config.profile)) and traced[-1] <= first:  # no error: the same command must go on
        this.say(f"profile: steps {config.profile} are done, nothing is traced")
    if first >= config.steps:
        this.say(f"resumed at step {first}: finished")
    elif first:
        this.say(f"resumed at step {first}; the learning rate follows the schedule of --steps {config.steps}")
