"""Which devices a run takes."""

import jax
import pytest

from zigzag_jax.train.config import Config, HostsConfig, MeshConfig
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.mesh import check_batch, make_mesh, mesh_shape, start_devices


@pytest.mark.parametrize(
    ("given", "devices", "shape"),
    [
        (MeshConfig(), None, (2, 1, 2)),
        (MeshConfig(), 3, (1, 1, 3)),
        (MeshConfig(cp=4), None, (1, 1, 4)),
        (MeshConfig(dp=2), 8, (2, 1, 1)),
        (MeshConfig(dp=2, fsdp=2, cp=2), 8, (2, 2, 2)),
    ],
)
def test_shape(given: MeshConfig, devices: int | None, shape: tuple[int, int, int]):
    assert mesh_shape(given, devices) == shape


@pytest.mark.usefixtures("cpu")
def test_mesh_takes_the_first_devices_with_auto_axes():
    mesh = make_mesh(Config(mesh=MeshConfig(dp=2, cp=3)))
    assert dict(mesh.shape) == {"dp": 2, "fsdp": 1, "cp": 3}
    assert list(mesh.devices.flat) == jax.devices()[:6]
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


@pytest.mark.usefixtures("cpu")
def test_too_few_devices():
    with pytest.raises(UserError, match=r"^mesh: dp \* fsdp \* cp must be at most the 8 devices there are, got 16"):
        make_mesh(Config(mesh=MeshConfig(cp=16)))


def test_rows_that_do_not_come_out_even():
    with pytest.raises(UserError, match=r"^batch: must be divisible by dp \* fsdp = 3, got 4"):
        check_batch(Config(batch=4), (3, 1, 2))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zigzag_jax.train.mesh.on_cpu", lambda: True)


@pytest.mark.usefixtures("cpu")
def test_devices_that_the_processes_cannot_share():
    config = Config(mesh=MeshConfig(cp=4), hosts=HostsConfig("127.0.0.1:1", num_processes=3))
    with pytest.raises(UserError, match=r"^hosts.num-processes: must divide the mesh's 4 devices, got 3"):
        start_devices(config)


@pytest.mark.usefixtures("no_cpu")
def test_a_gpu_that_jax_cannot_use():
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS: must be cpu where JAX cannot use the GPU"):
        make_mesh(Config(mesh=MeshConfig(cp=2)))


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zigzag_jax.train.mesh.on_cpu", lambda: False)


@pytest.mark.usefixtures("no_cpu")
def test_cpu_devices_on_a_gpu():
    with pytest.raises(UserError, match=r"^cpu-devices: needs a run on the CPU .*, got 4"):
        start_devices(Config(cpu_devices=4))
