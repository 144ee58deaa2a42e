"""Which settings of JAX, XLA and NCCL all processes must share."""

import importlib.metadata
from pathlib import Path

import jax
import pytest

from zigzag_jax.train.hosts.settings import cuda_versions, jax_settings, variables, xla_flags


def test_settings_that_change_numbers_or_programs_are_compared():
    found = jax_settings(jax.config.values)
    for name in (
        "jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
        "jax_use_shardy_partitioner", "jax_numpy_dtype_promotion", "jax_debug_nans", "jax_disable_jit",
        "jax_cpu_collectives_implementation", "jax_compiler_enable_remat_pass", "jax_optimization_level",
    ):  # fmt: skip
        assert name in found
    with jax.default_matmul_precision("highest"):
        assert jax_settings(jax.config.values)["jax_default_matmul_precision"] == "highest" != found[name]


def test_what_a_host_has_for_itself_is_not():
    found = jax_settings(jax.config.values)
    for name in (
        "jax_compilation_cache_dir", "jax_dump_ir_to", "jax_log_compiles", "jax_num_cpu_devices",
        "jax_cuda_visible_devices", "jax_cross_host_transfer_socket_address", "jax_debug_log_modules",
    ):  # fmt: skip
        assert name in jax.config.values
        assert name not in found


def test_a_new_setting_is_compared():
    assert jax_settings({"jax_of_tomorrow": 1}) == {"jax_of_tomorrow": "1"}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", {}),
        ("--xla_a=1 --xla_b --xla_a=2", {"XLA_FLAGS --xla_a": "2", "XLA_FLAGS --xla_b": "true"}),
        ("--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=8 --xla_x_autotune_cache_dir=/tmp", {}),
        ("--xla_a='1 2'", {"XLA_FLAGS --xla_a": "1 2"}),
    ],
)
def test_flags_of_xla(text: str, want: dict[str, str]):
    assert xla_flags(text) == want


def test_a_file_of_flags(tmp_path: Path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_b=2\n")
    assert xla_flags(str(tmp_path / "flags")) == {"XLA_FLAGS --xla_a": "1", "XLA_FLAGS --xla_b": "2"}
    with pytest.raises(FileNotFoundError):
        xla_flags(str(tmp_path / "none"))


def test_variables():
    assert variables({"NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "eth0", "PATH": "/bin"}) == {"NCCL_ALGO": "Ring"}


def test_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch):
    def version(name: str) -> str:
        if "13" in name:
            return "1.2"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert cuda_versions()["version of jax-cuda13-plugin"] == "1.2"
    assert "version of jax-cuda12-plugin" not in cuda_versions()
