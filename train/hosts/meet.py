"""Several processes become one: they say what they run, and JAX makes one set of their devices."""

from collections.abc import Callable
from contextlib import ExitStack

from zigzag_jax.train.config import Config
from zigzag_jax.train.hosts.agree import Facts, call_roll
from zigzag_jax.train.hosts.link import Link
from zigzag_jax.train.mesh import join


def meet(config: Config, those: Facts, found: str, stack: ExitStack, say: Callable[[str], None]) -> Link:
    """The wire to the other processes, closed by `stack`.

    `those` is what all must have in common, `found` where config.hosts was found. Raises what `call_roll` raises.
    """
    hosts = config.hosts
    say(f"process {hosts.process_id} of {hosts.num_processes}, coordinator {hosts.coordinator} (from {found})")
    link = stack.enter_context(call_roll(config, those))
    say(f"all processes are there and run the same: {', '.join(map(link.name, range(min(len(link.hosts), 16))))}")
    join(hosts)
    return link
