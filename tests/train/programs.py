"""Programs that processes share when they are started one after the other."""

from pathlib import Path


def shared_programs(folder: Path) -> dict[str, str]:
    """Environment variables: what one process compiles, the next one reads."""
    return {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
