"""The roll call at the start: all processes are there, and run the same code, flags, settings and libraries.

Every process says what it runs (`facts`, `settings`); process 0 waits for all, compares, and answers all alike. This is
before JAX joins the processes, for two that differ hang in their first common computation, or train nonsense without a
word, and a process that is missing is not named by JAX. Which devices each one brings is known after (`check_devices`).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from zigzag_jax.train.config import Config
from zigzag_jax.train.data.open_data import tokens_digest
from zigzag_jax.train.errors import PeerError, UserError
from zigzag_jax.train.flags import flags_of
from zigzag_jax.train.hosts.discover import address
from zigzag_jax.train.hosts.link import Link, patience
from zigzag_jax.train.hosts.settings import cuda_versions, jax_settings, variables, xla_flags

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
_OWN = ("hosts.process-id", "hosts.coordinator", "cpu-devices", "dry-run")  # flags in which processes may differ
_LONGEST = 1 << 20  # bytes of a line; who sends more is no process of this run

Facts = dict[str, str]


def facts(config: Config) -> Facts:
    """What all processes have to have in common, by name."""
    flags = {name: str(value) for name, value in flags_of(config).items() if name not in _OWN}
    versions = {f"version of {name}": _version(name) for name in LIBRARIES}
    flags |= {"data": tokens_digest(config.data), "code of zigzag_jax": source_digest()}
    return flags | {"version of python": platform.python_version()} | versions | cuda_versions()


def settings() -> Facts:
    """What all processes have to have in common beside their flags, by name. UserError for XLA_FLAGS that names a file
    which cannot be read.
    """
    try:
        flags = xla_flags(os.environ.get("XLA_FLAGS", ""))
    except (OSError, ValueError) as error:
        rule = f"must be flags, or a file of them ({getattr(error, 'strerror', None) or error})"
        raise UserError("XLA_FLAGS", rule, os.environ["XLA_FLAGS"]) from None
    return jax_settings(jax.config.values) | flags | variables(os.environ)


def source_digest() -> str:
    """Digest of the installed Python files."""
    found = hashlib.sha256()
    root = Path(__file__).parents[2]
    assert root.name == "zigzag_jax"  # the package, not what a link in it stands for
    for folder in (root, root / "models", root / "train"):  # two of them are links in a checkout; rglob skips links
        for path in sorted(folder.rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]


def first_difference(everyone: Mapping[int, Facts], hosts: list[str]) -> tuple[str, str, str] | None:
    """(field, rule, value) of the first fact in which a process differs from process 0; None: all agree."""
    for name in {name: None for those in everyone.values() for name in those}:
        want = everyone[0].get(name, "none")
        for process, those in sorted(everyone.items()):
            if (got := those.get(name, "none")) != want:
                rule = f"must be the same in all processes, {want} in process 0 ({hosts[0]})"
                return name, rule, f"{got} in process {process} ({hosts[process]})"
    return None


def check_devices(devices: Sequence[jax.Device], hosts: list[str]) -> None:
    """UserError where a process brings GPUs of another kind than process 0, or more, or fewer."""
    kinds = {process: Counter[str]() for process in range(len(hosts))}
    for device in devices:
        if device.platform != "cpu":  # these pose as as many as each is told, --cpu-devices
            kinds[device.process_index][device.device_kind] += 1
    said = {p: ", ".join(f"{n} x {kind}" for kind, n in sorted(found.items())) for p, found in kinds.items()}
    if (difference := first_difference({p: {"devices": text} for p, text in said.items()}, hosts)) is not None:
        raise UserError(*difference)


def call_roll(config: Config, those: Facts) -> Link:
    """The wire between all processes. UserError where they differ, PeerError where one is missing after the timeout."""
    hosts = config.hosts
    assert hosts.coordinator is not None
    host, port = address(hosts.coordinator)
    me = {
        "process": hosts.process_id,
        "host": socket.gethostname(),
        "facts": those | settings(),
        "size": hosts.num_processes,
    }
    end = time.monotonic() + hosts.timeout
    if hosts.process_id == 0:
        return _take_calls(port, me, end, hosts.timeout)
    return _call(host, port, me, end, hosts.timeout)


def _take_calls(port: int, me: dict[str, Any], end: float, timeout: int) -> Link:
    size, found, lines = me["size"], {0: me}, {}
    with _listener(port) as server:
        while len(found) < size and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
            except OSError:
                continue  # nobody came in time
            try:
                peer.settimeout(min(left, 10.0))
                it = json.loads(_read_line(peer))
                process, its_size = int(it["process"]), int(it["size"])
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()  # nobody of ours
                continue
            if its_size != size:
                rule = f"must be the same in all processes, {size} in process 0 ({me['host']})"
                value = f"{its_size} in process {process} ({it.get('host')})"
                return _refuse([*lines.values(), peer], {"user": ["hosts.num-processes", rule, value]})
            if process in found:
                _tell([peer], {"user": ["hosts.process-id", "must be given to one process each", process]})
                peer.close()
                continue
            found[process], lines[process] = it, peer
    hosts = [found[p]["host"] if p in found else "?" for p in range(size)]
    if missing := [p for p in range(size) if p not in found]:
        text = f"{', '.join(f'process {p}' for p in missing[:8])} of {size} did not come within {timeout} s"
        return _refuse(lines.values(), {"gone": text})
    if (difference := first_difference({p: it["facts"] for p, it in found.items()}, hosts)) is not None:
        return _refuse(lines.values(), {"user": difference})
    _tell(lines.values(), {"hosts": hosts})
    return Link(0, lines, hosts, patience(timeout))


def _call(host: str, port: int, me: dict[str, Any], end: float, timeout: int) -> Link:
    while True:
        peer = None
        try:
            peer = socket.create_connection((host, port), timeout=max(0.1, min(5.0, end - time.monotonic())))
            peer.settimeout(max(1.0, end - time.monotonic()) + 5.0)  # process 0 waits as long for the others
            peer.sendall(json.dumps(me).encode() + b"\n")
            answer = json.loads(_read_line(peer))
            break
        except (OSError, ValueError) as error:
            if peer is not None:
                peer.close()
            if time.monotonic() > end:
                text = f"process 0 did not answer at {host}:{port} within {timeout} s ({error or type(error).__name__})"
                raise PeerError(text) from None
            time.sleep(0.2)
    if "hosts" not in answer:
        peer.close()
        return _refuse([], answer)
    return Link(me["process"], {0: peer}, answer["hosts"], patience(timeout))


def _refuse(lines: Collection[socket.socket], answer: dict[str, Any]) -> Link:
    """Tell the others what they are to raise too, hang up, and raise it."""
    _tell(lines, answer)
    for peer in lines:
        peer.close()
    if "gone" in answer:
        raise PeerError(answer["gone"])
    raise UserError(*answer["user"])


def _tell(lines: Collection[socket.socket], answer: dict[str, Any]) -> None:
    for peer in lines:
        with contextlib.suppress(OSError):  # it died meanwhile; the wire will say so
            peer.sendall(json.dumps(answer).encode() + b"\n")


def _listener(port: int) -> socket.socket:
    """Where the others call; a run that was here a moment ago does not keep the port."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=4096)
    except OSError as error:
        raise UserError("hosts.coordinator", f"must have a free port on this host ({error.strerror})", port) from None


def _read_line(peer: socket.socket) -> bytes:
    """Up to the end of a line, byte by byte at its end: what follows belongs to the wire."""
    data = b""
    while not data.endswith(b"\n"):
        seen = peer.recv(4096, socket.MSG_PEEK)
        if not seen or len(data) > _LONGEST:
            raise ValueError("the line broke off")
        data += peer.recv(seen.index(b"\n") + 1 if b"\n" in seen else len(seen))
    return data


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
