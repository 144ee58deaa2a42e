"""Everything a run can be told, as frozen dataclasses; the command line is made of them, field by field.

A run is its Config: `python -m zigzag_jax.train --model tiny-qwen3-moe --mesh.cp 4` and
`run(Config(mesh=MeshConfig(cp=4)))` are the same. The same Config again resumes. `check` finds the mistakes that need
no device and no file.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from zigzag_jax.models import sharding
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.groups import parse
from zigzag_jax.train.logs.trace import profile_steps


@dataclass(frozen=True)
class MeshConfig:
    """Devices = dp * fsdp * cp. With no axis given: 2 x 2 (dp x cp) CPU devices, or cp over all GPUs."""

    dp: int | None = None
    """Data parallel replicas: rows are cut over them, parameters are not."""
    fsdp: int | None = None
    """Shards of the parameters that also cut the rows."""
    ep: int | None = None
    """Expert parallelism: devices that share the experts, 1, cp, fsdp or fsdp * cp of those there are; no factor."""
    cp: int | None = None
    """Context parallelism: each sequence lies over this many devices, in zigzag order."""


@dataclass(frozen=True)
class HostsConfig:
    """Several processes as one run; the same command on each, but for process_id. Under srun, mpirun or a JobSet none
    of these is needed (train/hosts/discover.py).
    """

    coordinator: str | None = None
    """ADDRESS:PORT of process 0."""
    num_processes: int = 1
    """Processes in the run."""
    process_id: int = 0
    """Number of this process, 0 .. num_processes - 1."""
    timeout: int = 300
    """Seconds without a finished step, or without the others at the start, until a run ends with exit code 70; what
    compiles has ten times that.
    """


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or Muon, and its schedule (docs/training.md)."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for hidden matrices and AdamW for the rest."""
    learning_rate: float = 2e-3
    """Peak learning rate, of both; Muon's steps have the size of AdamW's."""
    warmup: int = 30
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """What follows the warm-up, down to final_fraction at --steps; wsd: constant, then linear in its last part."""
    decay_fraction: float = 0.2
    """The part of --steps, at its end, in which wsd comes down."""
    final_fraction: float = 0.1
    """Last learning rate as a fraction of the peak (but for constant)."""
    weight_decay: float = 0.1
    """Decay of matrices; norms are not decayed."""
    groups: tuple[str, ...] = ()
    """PATTERN=LR_SCALE or PATTERN=LR_SCALE,WEIGHT_DECAY: for parameters whose name fits, first fit first; '*norm*=0.5'.
    """
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    clip: float = 1.0
    """Global gradient norm over which gradients are scaled down."""
    z_loss: float = 0.0
    """Weight of the mean squared logarithm of the softmax's denominator, which keeps logits from drifting; 0: none."""


@dataclass(frozen=True)
class RouterConfig:
    """How the experts' load is kept level (zigzag_jax/models/balance.py)."""

    aux_loss: Literal["hf", "batch", "sequence"] | None = None
    """What one product is taken over: all layers and tokens, a layer's tokens, or a row's tokens in a layer; default:
    the model's own."""
    aux_coefficient: float | None = None
    """Weight of the auxiliary loss; default: the model's own; 0: none."""
    bias_rate: float = 0.0
    """Step by which a bias of each expert is moved after every batch towards an even load; 0: no bias."""


@dataclass(frozen=True)
class Config:
    """Train a mixture-of-experts language model with its sequence sharded over a zigzag ring."""

    model: str = "tiny-qwen3-moe"
    """Name of a model, or a folder: Hugging Face's or imported, with config.json, weights and tokenizer.json."""
    random_init: bool = False
    """Take a model folder's sizes only, with random weights."""
    data: Path | None = None
    """Text (a file or a folder), a folder of tokens, or a mixture of these (docs/data.md); default: the source text of
    Python's own library.
    """
    tokenizer: Path | None = None
    """A tokenizer.json; default: the model folder's, the tokens' own, or a byte-level BPE trained on the text, once."""
    out: Path | None = None
    """Folder of checkpoints, metrics and pictures; default runs/MODEL."""
    steps: int = 400
    """Optimiser steps of the whole run, those of earlier starts included."""
    seq_len: int = 512
    """Tokens in a row."""
    batch: int = 8
    """Rows a step over the whole mesh, those of all micro-batches."""
    accumulate: int = 1
    """Micro-batches that a step goes through, one after another, to need less memory; divides batch / (dp * fsdp)."""
    seed: int = 0
    """Seed of the weights and of the order of the data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the arithmetic; parameters and sums are float32."""
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 3
    """Checkpoints to keep."""
    eval_every: int = 100
    """Steps between looks at the held-out loss."""
    remat: Literal["none", "matmuls", "attention", "full", "offload"] = "attention"
    """What a layer keeps for its backward: everything; its input and the results of attention and matmuls; its input
    and the attention's result; its input only; offload: as attention, in the host's memory."""
    strategy: Literal["ring", "allgather"] = "ring"
    """How queries meet keys; with many short documents in a row allgather waits less, for cp times the memory of k, v.
    """
    payload: Literal["latent", "expanded"] | None = None
    """What of DeepSeek's keys and values travels: what they are made of, or themselves; default: what a cost rule
    predicts to take less time.
    """
    cpu_devices: int | None = None
    """CPU devices of this process where there is no GPU; default: as many as the mesh needs."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the numbers of metrics.jsonl too; needs the package wandb."""
    profile: str | None = None
    """Steps to trace, A:B or N, counted from 1: written to profile/ in the run's folder, summed up by named scope."""
    dry_run: bool = False
    """Print the mesh, the bytes of parameters and optimiser a device, what the ring sends, and stop."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are used."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    """Several processes as one run."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How the experts' load is kept level."""

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.out if self.out is not None else Path("runs") / Path(self.model).name


def expert_axes(mesh: MeshConfig) -> tuple[str, ...]:
    """The mesh axes that the experts are cut over. UserError for an ep that is none of the four."""
    fsdp, cp = mesh.fsdp or 1, mesh.cp or 1
    try:
        return sharding.expert_axes(mesh.ep or 1, fsdp, cp)
    except ValueError:
        raise UserError("mesh.ep", sharding.expert_rule(fsdp, cp), mesh.ep) from None


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(name.replace("__", ".").replace("_", "-"), f"must be >= {least}", value)


def check(config: Config) -> None:
    """Raise UserError for a value that no run can have."""
    mesh, hosts, optim = config.mesh, config.hosts, config.optim
    if not config.model:
        raise UserError("model", "must be a model's name or folder", config.model)
    _at_least(1, mesh__dp=mesh.dp, mesh__fsdp=mesh.fsdp, mesh__ep=mesh.ep, mesh__cp=mesh.cp)
    _at_least(2, seq_len=config.seq_len)
    _at_least(1, steps=config.steps, batch=config.batch, accumulate=config.accumulate)
    _at_least(1, save_every=config.save_every, eval_every=config.eval_every)
    _at_least(1, keep=config.keep, cpu_devices=config.cpu_devices, hosts__num_processes=hosts.num_processes)
    _at_least(1, hosts__timeout=hosts.timeout)
    _at_least(0, seed=config.seed, optim__warmup=optim.warmup)
    if not mesh.dp is mesh.fsdp is mesh.cp is None:  # else it is the number of devices that says
        expert_axes(mesh)
    if not 0 <= hosts.process_id < hosts.num_processes:
        raise UserError("hosts.process-id", f"must be in 0 .. {hosts.num_processes - 1}", hosts.process_id)
    if hosts.num_processes == 1 and hosts.coordinator is not None:
        raise UserError("hosts.num-processes", "must be given with --hosts.coordinator", hosts.num_processes)
    if hosts.num_processes > 1 and hosts.coordinator is None:
        raise UserError("hosts.coordinator", "must be ADDRESS:PORT with several processes", None)
    if not 0 < optim.learning_rate < float("inf"):
        raise UserError("optim.learning-rate", "must be > 0 and finite", optim.learning_rate)
    if not optim.clip > 0:
        raise UserError("optim.clip", "must be > 0", optim.clip)
    if not 0 <= optim.final_fraction <= 1:
        raise UserError("optim.final-fraction", "must be in 0 .. 1", optim.final_fraction)
    if not 0 < optim.decay_fraction <= 1:
        raise UserError("optim.decay-fraction", "must be > 0 and <= 1", optim.decay_fraction)
    for name in ("b1", "b2", "muon_momentum"):
        if not 0 <= getattr(optim, name) < 1:
            raise UserError(f"optim.{name.replace('_', '-')}", "must be >= 0 and < 1", getattr(optim, name))
    for text in optim.groups:
        parse(text)
    if not 0 <= optim.z_loss < float("inf"):
        raise UserError("optim.z-loss", "must be >= 0 and finite", optim.z_loss)
    for name in ("aux_coefficient", "bias_rate"):
        if (value := getattr(config.router, name)) is not None and not 0 <= value < float("inf"):
            raise UserError(f"router.{name.replace('_', '-')}", "must be >= 0 and finite", value)
    if (traced := profile_steps(config.profile)) and traced[-1] > config.steps:
        raise UserError("profile", f"must be steps that are trained, 1 .. {config.steps} of --steps", config.profile)
    if config.seed >= 2**32:
        raise UserError("seed", "must be < 2**32", config.seed)
    if not 0 <= optim.weight_decay < float("inf"):
        raise UserError("optim.weight-decay", "must be >= 0 and finite", optim.weight_decay)
