"""`python -m zigzag_jax.train`: the fields of train/config.py as flags."""

import errno
import os
import sys
import traceback

import jax
import tyro

from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import FAILED, INTERRUPTED, PEER_GONE, USER_ERROR, PeerError, RunError, UserError
from zigzag_jax.train.loop import run

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def main(arguments: list[str] | None = None, default: Config | None = None, about: str | None = None) -> int:
    """Run the command line; returns the exit code.

    A script of its own (examples/pretrain_*.py) gives other defaults, and what --help says `about` it.
    """
    prog = "python -m zigzag_jax.train" if about is None else None
    config = tyro.cli(Config, args=arguments, prog=prog, description=about, default=default or Config())
    try:
        return run(config)
    except UserError as error:
        return _fail(f"error: {error}", USER_ERROR)
    except PeerError as error:
        return _fail(f"error: {error}", PEER_GONE)
    except RunError as error:
        return _fail(f"error: {error}", FAILED)
    except KeyboardInterrupt:
        return _fail(f"interrupted; the same command again goes on from what is saved in {config.folder}", INTERRUPTED)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        return _fail(f"error: {error.strerror}: {error.filename or config.folder}", FAILED)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        return _fail(traceback.format_exc().rstrip(), FAILED)


def _fail(text: str, code: int) -> int:
    sys.stderr.write(text + "\n")
    if jax.distributed.is_initialized():  # at its exit JAX would wait for the other processes, which wait for this one
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
