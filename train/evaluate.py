"""`python -m zigzag_jax.train.evaluate FOLDER --data TEXT`: the perplexity of a model on a text, and where it lies.

FOLDER is Hugging Face's, an imported one, or a training run (its newest checkpoint). The text is packed into rows as in
training (a document longer than a row is cut) and goes through the ring; the losses come back into natural order, and
are shown by how many tokens of its document a token can look back on: does the model use what stands far back? With
--out every token's loss is written down.

Several processes evaluate as one, found as the trainer's are: each reads its pieces of weights and text, all have every
loss, and process 0 speaks and writes.
"""

import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from zigzag_jax.layout import from_zigzag
from zigzag_jax.models.devices import use_cpu_without_gpu
from zigzag_jax.models.hf.saved import Source, open_source, read_state
from zigzag_jax.models.progress import ByteBar
from zigzag_jax.models.registry import ModelConfig, model_of, read_config
from zigzag_jax.models.sharding import abstract_state
from zigzag_jax.train.config import Config, HostsConfig, MeshConfig, check
from zigzag_jax.train.data.batches import BLANK, Batches, Block
from zigzag_jax.train.data.dataset import Dataset
from zigzag_jax.train.data.open_data import open_data
from zigzag_jax.train.data.plan_file import kept_plan
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.errors import DONE, RunError, UserError, exit_code, leave, refusal
from zigzag_jax.train.hosts.agree import check_devices, facts
from zigzag_jax.train.hosts.discover import find_hosts
from zigzag_jax.train.hosts.meet import meet
from zigzag_jax.train.hosts.together import lowest
from zigzag_jax.train.hosts.watchdog import PATIENT, Watchdog
from zigzag_jax.train.mesh import make_mesh, make_sharding, start_devices
from zigzag_jax.train.task import Task

_LINE_EVERY = 10.0  # seconds between lines of progress


@dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity of a model on a text."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A Hugging Face folder, an imported one, a run or one of its checkpoints."""
    data: Path | None = None
    """Text (a file or a folder), a folder of tokens or a mixture; default: the source text of Python's own library."""
    tokenizer: Path | None = None
    """A tokenizer.json; default: the one in the folder."""
    part: Literal["all", "held-out"] = "all"
    """The whole text, or only what the trainer would hold out of it."""
    seq_len: int = 4096
    """Tokens in a row: what a token can look back on at most."""
    batch: int = 2
    """Rows at a time over the whole mesh."""
    rows: int | None = None
    """Stop after so many rows; default: all of them."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of weights and arithmetic; losses are summed in float64."""
    out: Path | None = None
    """An .npz file to write: tokens, labels, positions, losses, each [rows, seq-len] in natural order."""
    cpu_devices: int | None = None
    """CPU devices where there is no GPU; default: as many as the mesh needs."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are used."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Several processes as one; timeout: seconds that a batch may take."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(EvaluateConfig, args=arguments, prog="python -m zigzag_jax.train.evaluate")
    use_cpu_without_gpu()
    try:
        evaluate(config, lambda text: print(text, flush=True))  # noqa: T201
    except (UserError, RunError) as error:
        return leave(f"error: {error}", exit_code(error))
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        return leave(traceback.format_exc().rstrip(), exit_code(error))
    return DONE


def evaluate(config: EvaluateConfig, say: Callable[[str], None]) -> float:
    """Say the table, in process 0; returns the mean loss in nats a token. UserError for what a person can mend."""
    hosts, found = find_hosts(config.hosts, os.environ)
    trainer = Config(
        model=str(config.folder), data=config.data, tokenizer=config.tokenizer, seq_len=config.seq_len,
        batch=config.batch, mesh=config.mesh, hosts=hosts, cpu_devices=config.cpu_devices, dtype=config.dtype,
    )  # fmt: skip
    check(trainer)
    if config.rows is not None and config.rows < 1:
        raise UserError("rows", "must be >= 1", config.rows)
    if config.out is not None and (config.out.suffix != ".npz" or not config.out.parent.is_dir()):
        raise UserError("out", "must be a file that ends in .npz, in a folder that exists", config.out)
    say = say if hosts.process_id == 0 else lambda text: None
    start_devices(trainer)
    with ExitStack() as stack:
        watchdog = _together(config, trainer, found, stack, say)
        doing = watchdog.doing if watchdog else lambda *what: None
        mesh = make_mesh(trainer)
        if watchdog:
            watchdog.on(mesh)
        whole = _scored(config, trainer, mesh, say, doing)
        doing(0, "writing after batch", PATIENT)
        if config.out is not None and hosts.process_id == 0:
            _write(config.out, {name: whole[name] for name in ("tokens", "labels", "positions", "losses")})
            say(f"wrote {config.out}: tokens, labels, positions, losses {whole['losses'].shape}")
        lowest(0)  # the others wait here, and end with process 0 where it cannot write
        return _table(whole, say)


def _together(
    config: EvaluateConfig, trainer: Config, found: str, stack: ExitStack, say: Callable[[str], None]
) -> Watchdog | None:
    """Meet the other processes, if any; who watches that they stay."""
    if trainer.hosts.num_processes == 1:
        return None
    own = {"rows": str(config.rows), "part": config.part}
    link = meet(trainer, facts(trainer) | own, found, stack, say)
    watchdog = stack.enter_context(Watchdog(None, trainer.hosts.timeout, link))
    check_devices(jax.devices(), link.hosts)
    return watchdog


def _scored(
    config: EvaluateConfig, trainer: Config, mesh: Mesh, say: Callable[[str], None], doing: Callable[..., None]
) -> Block:
    """All rows in natural order, and their losses; `doing` is told what goes on, as Watchdog.doing is."""
    preparing = lambda what: doing(0, f"{what} before batch", PATIENT)
    source, sizes = _open(config.folder)
    sharding = make_sharding(trainer, sizes, mesh)
    dataset = open_data(
        config.data, config.tokenizer or source.beside / "tokenizer.json", process_index=trainer.hosts.process_id,
        say=say, working=lambda: preparing("reading the data"), wait_s=PATIENT * trainer.hosts.timeout,
    )  # fmt: skip
    if dataset.vocab_size > sizes.vocab_size:
        raise UserError("tokenizer", f"must have at most the model's {sizes.vocab_size} tokens", dataset.vocab_size)
    how = {"dtype": jnp.dtype(config.dtype), "router_bias": source.router_bias}
    make = lambda rngs: model_of(sizes)(sizes, sharding, rngs=rngs, **how)
    graphdef, shapes = abstract_state(make)
    say("reading weights")
    try:
        with ByteBar("reading weights", "read", Console(stderr=True, quiet=trainer.hosts.process_id != 0)) as bar:

            def told(done: int, total: int) -> None:
                bar(done, total)
                preparing("reading the weights")  # a slow disk is no hang

            params = read_state(source, sizes, shapes, sharding, jnp.dtype(config.dtype), told)
    except ValueError as error:
        raise UserError("folder", f"must hold the weights of its config ({error})", config.folder) from None
    task = Task(graphdef, sharding, jnp.dtype(config.dtype), "hf", 0.0)
    blocks = list(_losses(config, dataset, task, params, say, doing))
    if not any((block["labels"] >= 0).any() for block in blocks):
        raise UserError("data", f"must hold a token to predict in its part {config.part}", config.data)
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _open(folder: Path) -> tuple[Source, ModelConfig]:
    try:
        source = open_source(folder)
        return source, read_config(source.config)
    except (OSError, ValueError, NotImplementedError) as error:
        raise refusal(error, "folder", f"must be a model with its weights ({error})", folder) from None


def _losses(
    config: EvaluateConfig, dataset: Dataset[Tokens], task: Task, params: Any, say: Callable[[str], None],
    doing: Callable[..., None],
) -> Iterator[Block]:  # fmt: skip
    """The arrays of each batch's rows in natural order, `losses` among them."""
    mesh = task.sharding.mesh
    run = jax.jit(task.token_losses, out_shardings=NamedSharding(mesh, P()))  # every process reads all of them
    left, spoken = config.rows, time.monotonic()
    for store in (dataset.held_out,) if config.part == "held-out" else (dataset.train, dataset.held_out):
        if not store.size:
            continue
        doing(0, "packing the rows before batch", PATIENT)
        plan = kept_plan(store.lengths, config.seq_len, seed=0, say=say)
        with Batches(store, plan, config.batch, mesh, repeat=False) as all_:
            for n in range(len(all_)):
                rows = all_.rows(n)
                doing(n + 1, "scoring batch", PATIENT if n == 0 else 1.0)  # the first compiles
                keep = np.flatnonzero(rows != BLANK)[: config.batch if left is None else left]
                found = np.asarray(run(params, all_.at(n)), np.float64)
                natural = from_zigzag(found, mesh.shape["cp"])[:, : config.seq_len]
                yield all_.natural(rows[keep]) | {"losses": natural[keep]}
                if time.monotonic() - spoken > _LINE_EVERY:
                    spoken = time.monotonic()
                    say(f"{n + 1} of {len(all_)} batches")
                left = None if left is None else left - len(keep)
                if left == 0:
                    return


def _write(file: Path, arrays: Block) -> None:
    try:
        np.savez(file, **arrays)
    except OSError as error:
        raise refusal(error, "out", f"must be a file that can be written ({error.strerror})", file) from None


def _table(whole: Block, say: Callable[[str], None]) -> float:
    predicted = whole["labels"] >= 0
    losses, positions = whole["losses"][predicted], whole["positions"][predicted]
    say(f"{'tokens to look back on':>24}{'tokens':>12}{'nats':>9}{'perplexity':>13}")
    edges = [0, *(1 << n for n in range(6, 63)), 1 << 62]
    for low, high in itertools.pairwise(edges):
        there = (positions >= low) & (positions < high)
        if there.any():
            _row(say, f"{low} .. {high - 1}", losses[there])
    _row(say, "all", losses)
    return float(losses.mean())


def _row(say: Callable[[str], None], name: str, losses: np.ndarray) -> None:
    say(f"{name:>24}{losses.size:>12,}{losses.mean():>9.4f}{np.exp(losses.mean()):>13.2f}")


if __name__ == "__main__":
    sys.exit(main())
