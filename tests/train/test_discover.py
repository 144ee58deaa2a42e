"""Who am I, from what each launcher leaves in the environment."""

import pytest

from zigzag_jax.train.config import HostsConfig
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.hosts.discover import address, find_hosts, local_devices

SLURM = {
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[003-004]",
}  # fmt: skip
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
JOBSET = {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "run-0-0.run:1234", "JOB_COMPLETION_INDEX": "1"}


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, HostsConfig()),
        (SLURM, HostsConfig("gpu003:61441", 8, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "a7,b9"}, HostsConfig("a7:61441", 8, 5)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[1,7-9],x"}, HostsConfig("n1:61441", 8, 5)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "h:9"}, HostsConfig("h:9", 8, 5)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, HostsConfig()),  # a batch script, no srun
        (OMPI, HostsConfig("10.96.0.1:61442", 4, 3)),
        (JOBSET, HostsConfig("run-0-0.run:1234", 2, 1)),
        (JOBSET | {"JAX_PROCESS_ID": "0"}, HostsConfig("run-0-0.run:1234", 2, 0)),
        (SLURM | JOBSET, HostsConfig("run-0-0.run:1234", 2, 1)),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, HostsConfig("10.96.0.1:61442", 1, 0)),
    ],
)
def test_found(environment: dict[str, str], want: HostsConfig):
    assert find_hosts(HostsConfig(), environment)[0] == want


def test_flags_win_and_the_timeout_stays():
    flags = HostsConfig("a:1", 2, 1)
    assert find_hosts(flags, SLURM) == (flags, "flags")
    found, source = find_hosts(HostsConfig(timeout=7), SLURM)
    assert found.timeout == 7
    assert source == "SLURM_STEP_NUM_TASKS and SLURM_PROCID"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JOBSET | {"JOB_COMPLETION_INDEX": "x"}, r"^JOB_COMPLETION_INDEX: must be a number beside .*=2, got x"),
        ({"JAX_NUM_PROCESSES": "2"}, r"^JOB_COMPLETION_INDEX: must be a number beside .*, got None"),
        (JOBSET | {"JOB_COMPLETION_INDEX": "2"}, r"^JOB_COMPLETION_INDEX: must be in 0 .. 1, .*, got 2"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, r"^hosts.coordinator: must be ADDRESS:PORT of"),
    ],
)
def test_variables_that_do_not_hang_together(environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        find_hosts(HostsConfig(), environment)


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        ({}, None),
        (SLURM | {"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [3]),
        (SLURM | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, None),
        (SLURM | {"SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "3"}, None),
        (SLURM | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, [1]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, [1]),
    ],
)
def test_one_gpu_a_process(environment: dict[str, str], want: list[int] | None):
    assert local_devices(environment) == want


def test_addresses():
    assert address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert address("[::1]:80") == ("::1", 80)


@pytest.mark.parametrize("text", ["host", ":80", "host:", "host:x", "host:0", "host:70000"])
def test_no_address(text: str):
    with pytest.raises(UserError, match=r"^hosts.coordinator: must be ADDRESS:PORT, got "):
        address(text)
