"""`python -m zigzag_jax.train`: the fields of train/config.py as flags."""

import errno
import faulthandler
import sys
import traceback

import jax
import tyro

from zigzag_jax.train.config import Config
from zigzag_jax.train.errors import FAILED, RunError, UserError, exit_code, leave, may_come_back
from zigzag_jax.train.loop import run

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def main(arguments: list[str] | None = None, default: Config | None = None, about: str | None = None) -> int:
    """Run the command line; returns the exit code.

    A script of its own (examples/pretrain_*.py) gives other defaults, and what --help says `about` it.
    """
    prog = "python -m zigzag_jax.train" if about is None else None
    config = tyro.cli(Config, args=arguments, prog=prog, description=about, default=default or Config())
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # what crashes inside a library leaves the stacks of all threads
    try:
        return run(config)
    except (UserError, RunError) as error:
        return leave(f"error: {error}", exit_code(error))
    except KeyboardInterrupt as error:
        text = f"interrupted; the same command again goes on from what is saved in {config.folder}"
        return leave(text, exit_code(error))
    except Exception as error:
        code = exit_code(error)
        if isinstance(error, OSError) and (error.errno in _FULL or may_come_back(error)):
            return leave(f"error: {error.strerror or error}: {error.filename or config.folder}", code)
        if code == FAILED and not jax.distributed.is_initialized():
            raise
        return leave(traceback.format_exc().rstrip(), code)


if __name__ == "__main__":
    sys.exit(main())
