"""`python -m zigzag_jax.train`: the fields of train/config.py as flags."""

import sys

import tyro

from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import FAILED, INTERRUPTED, USER_ERROR, RunError, UserError
from zigzag_jax.train.loop import run


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(Config, args=arguments, prog="python -m zigzag_jax.train")
    try:
        return run(config)
    except UserError as error:
        return _fail(f"error: {error}", USER_ERROR)
    except RunError as error:
        return _fail(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command again goes on from what is saved in {config.folder}", INTERRUPTED)


def _fail(text: str, code: int) -> int:
    sys.stderr.write(text + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
