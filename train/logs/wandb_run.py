"""Weights & Biases, where --wandb PROJECT asks for it; the package is imported only then."""

import uuid
from pathlib import Path
from typing import Any

from zigzag_jax.train.errors import UserError

_ID = "wandb-id"  # beside metrics.jsonl: a resumed run goes on in the same place


def check_wandb(project: str | None) -> None:
    """UserError where a project is given and the package is not installed."""
    if project is None:
        return
    try:
        import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("wandb", "needs the package wandb (pip install wandb)", project) from None


def start_wandb(project: str | None, folder: Path | None, config: dict[str, Any]) -> Any:
    """A W&B run with log(values, step=) and finish(), or None without a project or a folder (all processes but one).

    `config` is what the run was told.
    """
    if project is None or folder is None:
        return None
    import wandb  # pyright: ignore[reportMissingImports]

    file = folder / _ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex)
    return wandb.init(
        project=project, name=folder.name, dir=str(folder), id=file.read_text(), resume="allow", config=config
    )
