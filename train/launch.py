"""`python -m zigzag_jax.train.launch --processes N -- FLAGS`: several processes of one run on this machine.

For a host with one process a GPU, and to try on one machine what many will do. Each process is `python -m
zigzag_jax.train FLAGS` with its --hosts flags; on a machine with GPUs process I sees the I-th alone (--gpus-per-process
for more), so there must be one for each. Over many hosts let srun, mpirun or Kubernetes start them: examples/.

A signal goes to all of them. When one ends with an error the others have GRACE seconds to end by themselves; the exit
code is the first that is not 0.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import tyro

from zigzag_jax.models.devices import has_gpu
from zigzag_jax.train.errors import USER_ERROR, UserError

_GRACE = 60.0  # seconds; the longest silence after which a process calls another gone


@dataclass(frozen=True)
class LaunchConfig:
    """Start several processes of one run on this machine; flags of zigzag_jax.train follow after `--`."""

    processes: int
    """How many."""
    gpus_per_process: int = 1
    """GPUs of each, where there are GPUs."""
    grace: float = _GRACE
    """Seconds that the others have after one has failed."""


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags of the launcher, flags of the trainer), which stand after `--`."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def commands(config: LaunchConfig, flags: Sequence[str], port: int) -> list[list[str]]:
    """The command line of each process. UserError where `processes` or the flags will not do."""
    if config.processes < 1:
        raise UserError("processes", "must be >= 1", config.processes)
    if config.gpus_per_process < 1:
        raise UserError("gpus-per-process", "must be >= 1", config.gpus_per_process)
    base = [sys.executable, "-m", "zigzag_jax.train", *flags]
    if config.processes == 1:
        return [base]
    for flag in flags:
        if flag.startswith(("--hosts.coordinator", "--hosts.num", "--hosts.process")):
            raise UserError(flag.removeprefix("--").split("=")[0], "must be left to the launcher", flag)
    base += ["--hosts.coordinator", f"127.0.0.1:{port}", "--hosts.num-processes", str(config.processes)]
    return [[*base, "--hosts.process-id", str(i)] for i in range(config.processes)]


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> list[str] | None:
    """The GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them; None where the run is to use the CPU."""
    if not has_gpu() or environment.get("JAX_PLATFORMS") == "cpu":
        return None
    if (given := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    count = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.iterdir())
    return [str(i) for i in range(count)]  # CUDA counts from 0 what a container sees, whatever the files are called


def environments(config: LaunchConfig, gpus: Sequence[str] | None) -> list[dict[str, str]]:
    """That of each process, with its GPUs chosen where there are any. UserError where there are too few."""
    each = config.gpus_per_process
    if gpus is None:
        return [dict(os.environ)] * config.processes
    if config.processes * each > len(gpus):
        rule = f"must be at most the {len(gpus)} GPUs there are" + (f" / {each} per process" if each > 1 else "")
        raise UserError("processes", f"{rule}, or run on the CPU (JAX_PLATFORMS=cpu)", config.processes)
    mine = (gpus[i * each : (i + 1) * each] for i in range(config.processes))
    return [os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in mine]


def wait(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> int:
    """The first exit code that is not 0, or 0; who is still there `grace` seconds after it is killed."""
    first, since = 0, 0.0
    while alive := [p for p in processes if p.poll() is None]:
        failed = [p.returncode for p in processes if p.returncode]
        if failed and not first:
            first, since = failed[0], time.monotonic()
        if first and time.monotonic() - since > grace:
            names = ", ".join(f"process {processes.index(p)}" for p in alive)
            sys.stderr.write(f"launch: {names} still there {grace:.0f} s after another ended with {first}: killed\n")
            for p in alive:
                p.kill()
        time.sleep(0.05)
    first = first or next((p.returncode for p in processes if p.returncode), 0)
    return first if first >= 0 else 128 - first  # killed by signal N: 128 + N, as a shell says


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    own, flags = split(sys.argv[1:] if arguments is None else arguments)
    config = tyro.cli(LaunchConfig, args=own, prog="python -m zigzag_jax.train.launch")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    try:
        lines = commands(config, flags, port)
        envs = environments(config, visible_gpus(os.environ))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for p in processes:
            if p.poll() is None:
                p.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    for line, env in zip(lines, envs, strict=True):  # a group of their own: Ctrl-C comes from here, once
        processes.append(subprocess.Popen(line, env=env, start_new_session=True))
    return wait(processes, config.grace)


if __name__ == "__main__":
    sys.exit(main())
