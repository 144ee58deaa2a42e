"""What a run is: what of its settings every checkpoint holds and no later start may change.

It is compared before anything is written into a run's folder, by all processes or by those that see a checkpoint.
"""

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zigzag_jax.models.registry import ModelConfig
from zigzag_jax.train.config import Config
from zigzag_jax.train.data.dataset import Dataset
from zigzag_jax.train.data.token_file import Tokens
from zigzag_jax.train.data.tokenizer import same_ids
from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.hosts.together import Together
from zigzag_jax.train.models import tokenizer_file, weights_digest
from zigzag_jax.train.reading import Fault, attempt, fault_of, reason, steps_in

IDENTITY = "identity"  # the item of a checkpoint that holds it

Tell = Callable[[str], None]
Look = Callable[[Path], tuple[dict[str, Any] | None, dict[int, str]]]


def identity_of(config: Config, sizes: ModelConfig, dataset: Dataset[Tokens]) -> dict[str, Any]:
    """What may not change when a run is resumed; the mesh, --steps and what is only said or saved may."""
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()
    # a field that a later version adds, with a default that changes nothing, is no other model
    own = {x.name: getattr(sizes, x.name) for x in dataclasses.fields(sizes) if getattr(sizes, x.name) != x.default}
    fixed: dict[str, Any] = {
        "model": _with_digest(config.model, digest(repr(own))),
        "weights": weights_digest(config),
        "data": _with_digest(config.data or "the default", dataset.digest),
        "tokenizer": _with_digest(tokenizer_file(config) or "of the data", same_ids(dataset.tokenizer)),
    }
    fixed |= {"seq-len": config.seq_len, "batch": config.batch, "seed": config.seed, "dtype": config.dtype}
    if (config.router.aux_loss or sizes.aux_loss) == "batch":  # the one loss that micro-batches change
        fixed["accumulate"] = config.accumulate
    for group in ("optim", "router"):
        values = dataclasses.asdict(getattr(config, group))
        # as JSON gives it back: a list, no tuple
        fixed |= {
            f"{group}.{name.replace('_', '-')}": list(x) if isinstance(x, tuple) else x for name, x in values.items()
        }
    return fixed


def newest_identity(folder: Path) -> tuple[dict[str, Any] | None, dict[int, str]]:
    """The identity in the newest checkpoint that has one, and why those of newer ones could not be read."""
    unread: dict[int, str] = {}
    for step in sorted(steps_in(folder), reverse=True):
        try:
            identity = json.loads((folder / str(step) / IDENTITY / "metadata").read_text())
        except Exception as error:
            if fault_of(error) is not Fault.CONTENT:
                raise
            unread[step] = reason(error)
            continue
        if isinstance(identity, dict):
            return identity, unread
        unread[step] = "it holds no JSON object"
    return None, unread


def check_identity(
    folder: Path, new: dict[str, Any], together: Together, tell: Tell, look: Look = newest_identity
) -> None:
    """UserError, in all processes, where `folder` holds the checkpoints of another run than `new`.

    What saved_identity raises, too.
    """
    old, wrong = saved_identity(folder, together, tell, look), None
    try:
        compare(old or {}, new)
    except UserError as error:
        wrong = error
    who = together.first(wrong is not None)
    if wrong is None and who is not None:  # this host does not show what the other one read
        wrong = UserError("out", f"must hold the checkpoints of this run (process {who} says why not)", folder)
    if wrong is not None:
        raise wrong


def compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    """UserError for the first field in which a resumed run would be another run.

    Of what has a digest that alone is compared: a folder may lie elsewhere, or be named in another way.
    """
    for name, value in new.items():
        if name in old and _compared(old[name]) != _compared(value):
            raise UserError(name, f"must stay what the run was begun with, {old[name]} (or give another --out)", value)


def _with_digest(name: object, digest: str) -> str:
    """What a message says of something that is compared by its content."""
    return f"{name} (digest {digest[:12]})"


def _compared(value: Any) -> Any:
    """The digest of what `_with_digest` made, anything else itself."""
    found = re.search(r"\(digest (\w+)\)$", value) if isinstance(value, str) else None
    return value if found is None else found[1]


def saved_identity(folder: Path, together: Together, tell: Tell, look: Look = newest_identity) -> dict[str, Any] | None:
    """What the run that wrote the newest readable identity was, or None where there is no checkpoint; says which could
    not be read, and why. None too where only other processes see one. `look` is how one process reads.

    UserError where there are checkpoints and none says it, MachineError where the machine cannot read one.
    """
    identity: dict[str, Any] | None = None
    unread: dict[int, str] = {}
    for number, pause in enumerate((0.0, *together.pauses)):  # a host may show the files of a new folder late
        time.sleep(pause)
        found, _, why = attempt(lambda: look(folder), together, tell, "what run this is, in checkpoints")
        if found is None:
            raise MachineError(f"{folder} cannot be read, tried for {together.patience} ({why})")
        identity, unread = found
        told = together.first(identity is not None) is not None
        if told or together.first(bool(unread)) is None:
            break
        if number == 0:
            tell(f"no checkpoint says what run it is of; looked at again for {together.patience}")
    for step, cause in unread.items():
        tell(f"checkpoints/{step} does not say what run it is of ({cause}); an older one is asked")
    # one that sees it compares it for all, and none ends alone because its host does not show a new file yet
    if together.first(identity is not None) is None and unread:
        newest = max(unread)
        rule = f"must hold a checkpoint that says what run it is of ({unread[newest]})"
        raise UserError("out", rule, folder / str(newest))
    return identity
