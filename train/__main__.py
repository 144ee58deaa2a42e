"""`python -m zigzag_jax.train`: the fields of train/config.py as flags."""

import sys

import tyro

from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import USER_ERROR, UserError
from zigzag_jax.train.loop import run
from zigzag_jax.train.mesh import use_cpu_without_gpu


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(Config, args=arguments, prog="python -m zigzag_jax.train")
    use_cpu_without_gpu()
    try:
        return run(config)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
