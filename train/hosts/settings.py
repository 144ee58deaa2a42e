"""What changes a run's numbers or its collectives beside its flags: JAX's settings, XLA's flags, NCCL's variables.

Processes in which one of these differs compile different programs: they hang in a collective, or sum different things
without a word. The roll call (agree.py) compares them. What each host may have for itself is left out: caches, logs,
dumps, which devices a process sees.
"""

import importlib.metadata
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CUDA_LIBRARIES = (
    "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-nccl-cu12",
    "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas",
)  # fmt: skip
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE", "NCCL_COLLNET_ENABLE", "NCCL_MIN_CTAS",
    "NCCL_MAX_CTAS", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS", "NCCL_BUFFSIZE", "NCCL_P2P_NET_CHUNKSIZE",
)  # fmt: skip
_OWN_SETTINGS = re.compile(
    r"cache|log|dump|traceback|cross_host|mtls|visible_devices|num_cpu_devices|default_device|pprint|timeout|explain"
    r"|source|transfer_guard|thread_guard|distributed|mock|profile|debug_(?!nans|infs)"
)
_OWN_FLAGS = re.compile(r"dump|cache_dir|host_platform_device_count")


def jax_settings(values: Mapping[str, Any]) -> dict[str, str]:
    """Of jax.config.values, whatever set them (JAX_.. variables among others), those that all processes must share."""
    return {name: str(value) for name, value in values.items() if not _OWN_SETTINGS.search(name)}


def xla_flags(text: str) -> dict[str, str]:
    """The flags of XLA_FLAGS that all processes must share, by `XLA_FLAGS --name`; of several the last counts.

    As XLA does, takes `text` for a file's name where it begins with no dash. OSError where that cannot be read.

    >>> xla_flags("--xla_dump_to=/tmp --xla_gpu_autotune_level=0 --xla_allow_excess_precision")
    {'XLA_FLAGS --xla_gpu_autotune_level': '0', 'XLA_FLAGS --xla_allow_excess_precision': 'true'}
    """
    text = text.strip()
    if text and not text.startswith("-"):
        text = Path(text).read_text()
    split = (word.partition("=") for word in shlex.split(text))
    return {
        f"XLA_FLAGS {name}": value if sign else "true" for name, sign, value in split if not _OWN_FLAGS.search(name)
    }


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that NCCL and CUDA read and that all processes must share, where they are set."""
    return {name: environment[name] for name in VARIABLES if name in environment}


def cuda_versions() -> dict[str, str]:
    """Versions of what JAX computes with on GPUs, where it is installed."""
    found = {}
    for name in CUDA_LIBRARIES:
        try:
            found[f"version of {name}"] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
