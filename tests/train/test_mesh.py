"""Which devices a run takes."""

import jax
import pytest

from zigzag_jax.models.presets import PRESETS
from zigzag_jax.models.qwen3 import Qwen3Config
from zigzag_jax.train.config import Config, HostsConfig, MeshConfig
from zigzag_jax.train.errors import UserError
from zigzag_jax.train.mesh import check_batch, make_mesh, make_sharding, mesh_shape, start_devices

DENSE = Qwen3Config(
    vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
    intermediate_size=8,
)  # fmt: skip


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


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("ep", "spec"), [(None, ()), (1, ()), (2, ("cp",)), (4, ("fsdp", "cp"))], ids=["none", "1", "cp", "both"]
)
def test_experts_over_whole_axes(ep: int | None, spec: tuple[str, ...]):
    config = Config(mesh=MeshConfig(fsdp=2, cp=2, ep=ep))
    assert make_sharding(config, PRESETS["tiny-qwen3-moe"], make_mesh(config)).expert_axes == spec


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        (MeshConfig(cp=3, ep=3), PRESETS["tiny-qwen3-moe"], "must divide the model's 8 experts, got 3"),
        (MeshConfig(cp=2, ep=2), DENSE, "must be 1 for a model without experts, got 2"),
        (MeshConfig(ep=4), PRESETS["tiny-qwen3-moe"], r"must be 1, cp, fsdp or fsdp \* cp = 1, 2, 1 or 2, got 4"),
    ],
    ids=["not-a-divisor", "dense", "no-axis"],
)
def test_experts_that_cannot_be_cut_so(mesh: MeshConfig, sizes, message: str):
    config = Config(mesh=mesh)
    with pytest.raises(UserError, match=rf"^mesh.ep: {message}"):
        make_sharding(config, sizes, make_mesh(config))


def test_rows_that_do_not_come_out_even():
    with pytest.raises(UserError, match=r"^batch: must be divisible by dp \* fsdp = 3, got 4"):
        check_batch(4, 1, (3, 1, 2))
    with pytest.raises(
        UserError, match=r"^batch: must be divisible by accumulate \* dp \* fsdp = 2 \* 2 \* 1 = 4, got 6"
    ):
        check_batch(6, 2, (2, 1, 2))


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


@pytest.mark.usefixtures("cpu")
def test_several_processes_leave_no_device_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"^mesh: dp \* fsdp \* cp must be the 8 devices of all processes, got 4"):
        make_mesh(Config(mesh=MeshConfig(cp=4)))


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zigzag_jax.train.mesh.on_cpu", lambda: False)


@pytest.mark.usefixtures("no_cpu")
def test_cpu_devices_on_a_gpu():
    with pytest.raises(UserError, match=r"^cpu-devices: needs a run on the CPU .*, got 4"):
        start_devices(Config(cpu_devices=4))
