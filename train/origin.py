"""What a checkpoint says of the run that wrote it, for a person who finds it a year later.

Nothing here is compared when a run is resumed: what may not change is its identity (train/identity.py).
"""

import subprocess
from dataclasses import replace
from pathlib import Path

from zigzag_jax.train.config import Config, HostsConfig
from zigzag_jax.train.flags import command_line
from zigzag_jax.train.hosts.agree import facts

_HERE = Path(__file__).resolve().parents[1]  # the checkout that this file lies in, if it is one


def origin(config: Config) -> dict[str, str | None]:
    """The command, every flag, the digests of data and code, versions, and the git revision of a checkout."""
    anywhere = replace(config, hosts=HostsConfig())  # who this process was is not for another start to say
    return facts(config) | {"command": command_line(anywhere), "git revision": revision()}


def revision(checkout: Path = _HERE) -> str | None:
    """The commit of a checkout, with `-dirty` where files were changed since; None where the package is installed."""
    if not (checkout / ".git").exists():  # else git would look for one in the folders above
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or a folder that it does not trust
        return None
