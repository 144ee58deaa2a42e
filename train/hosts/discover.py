"""Which process of how many this is, and where process 0 is: from flags, else from whatever started the processes.

    started by                what is read
    flags                     --hosts.coordinator, --hosts.num-processes, --hosts.process-id: they win
    JAX's variables, JobSet   JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID or JOB_COMPLETION_INDEX
    srun                      SLURM_STEP_NUM_TASKS, SLURM_PROCID, SLURM_STEP_NODELIST; the port from SLURM_JOB_ID
    mpirun (Open MPI)         OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK; 4: OMPI_MCA_orte_hnp_uri, 5: a flag is needed

Only what is read here is used: JAX's own detection takes SLURM_NTASKS for the number of processes, which counts the
tasks of an allocation and not those of a step, so that a command without srun inside one waits for peers that nobody
started. `find_hosts` is a function of its arguments; nothing is looked up in a network.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from zigzag_jax.train.config import HostsConfig
from zigzag_jax.train.errors import UserError

_PORTS = range(61440, 65536)  # the port of a run that nobody chose one for, by its job's number


def find_hosts(flags: HostsConfig, environment: Mapping[str, str]) -> tuple[HostsConfig, str]:
    """(who this process is, where that was found). UserError for variables that do not hang together."""
    if flags.coordinator is not None or flags.num_processes > 1:
        return flags, "flags"
    if "JAX_NUM_PROCESSES" in environment:
        index = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environment else "JOB_COMPLETION_INDEX"
        return _from(flags, environment, "JAX_NUM_PROCESSES", index, environment.get("JAX_COORDINATOR_ADDRESS"))
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return _from(flags, environment, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", _slurm_address(environment))
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _from(flags, environment, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", _mpi_address(environment))
    return flags, "flags"


def local_devices(environment: Mapping[str, str]) -> list[int] | None:
    """The GPU of this process where a launcher started one process a GPU and left all of them visible, else None."""
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_LOCALID" in environment:
        rank, size = environment["SLURM_LOCALID"], environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
        size = max(int(n) for n in re.findall(r"(?:^|,)(\d+)", size))  # "4(x2),3": two nodes with 4 tasks, one with 3
    elif "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        rank, size = environment["OMPI_COMM_WORLD_LOCAL_RANK"], int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])
    else:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    bound = visible is not None and len(visible.split(",")) < size  # --gpus-per-task: the launcher has chosen already
    return None if size == 1 or bound else [int(rank)]


def address(text: str) -> tuple[str, int]:
    """HOST, PORT of a coordinator. UserError for text that is not ADDRESS:PORT."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError("hosts.coordinator", "must be ADDRESS:PORT", text)
    return host.strip("[]"), int(port)


def _from(
    flags: HostsConfig, environment: Mapping[str, str], count: str, index: str, coordinator: str | None
) -> tuple[HostsConfig, str]:
    try:
        size, mine = int(environment[count]), int(environment.get(index, ""))
    except ValueError:
        rule = f"must be a number beside {count}={environment[count]}"
        raise UserError(index, rule, environment.get(index)) from None
    if not 0 <= mine < size:
        raise UserError(index, f"must be in 0 .. {size - 1}, {count} - 1", mine)
    if size > 1 and coordinator is None:
        raise UserError("hosts.coordinator", f"must be ADDRESS:PORT of process 0 ({count} says {size} processes)", None)
    return replace(flags, coordinator=coordinator, num_processes=size, process_id=mine), f"{count} and {index}"


def _slurm_address(environment: Mapping[str, str]) -> str | None:
    """The first host of the step; its list is `node1`, `node1,node7`, `node[001-4],x` or `node[001,7]`."""
    given = environment.get("JAX_COORDINATOR_ADDRESS")
    first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))
    if given or first is None:
        return given
    return f"{first[1]}{first[2] or ''}:{_port(environment.get('SLURM_JOB_ID', '0'))}"


def _mpi_address(environment: Mapping[str, str]) -> str | None:
    """The host that mpirun of Open MPI 4 runs on; 5 tells its processes none."""
    given, uri = environment.get("JAX_COORDINATOR_ADDRESS"), environment.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"(\d+)\.\d+;tcp6?://\[?([^,:\]]+)", uri)
    if given or found is None:
        return given
    return f"{found[2]}:{_port(str(int(found[1]) // 4096))}"  # a job's number is a multiple of 4096


def _port(job: str) -> int:
    return _PORTS[int(job) % len(_PORTS)]
