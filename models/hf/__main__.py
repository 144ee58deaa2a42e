"""`python -m zigzag_jax.models.hf`: models from and to Hugging Face's folders, and whether they compute the same.

    import HF_DIR OUT                   stack the tensors as the models here have them, in the dtype of the files
    export OUT_OR_CHECKPOINT HF_DIR     write an imported model, or a training run's newest checkpoint, for transformers
    check HF_DIR --golden FILE          logits and gradients against those of a golden file, in float32

Exit codes: 0 done, 1 a tensor is over the bar, 2 a user's mistake (one line, nothing is written).
"""

import argparse
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from zigzag_jax.models.devices import start_ring, use_cpu_without_gpu
from zigzag_jax.models.hf.golden import compare
from zigzag_jax.models.hf.saved import Wrote, export_model, import_model

DONE, DIFFERS, USER_ERROR = 0, 1, 2
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    use_cpu_without_gpu()
    try:
        if args.command == "check":
            start_ring(args.cp, args.cpu_devices)
            same = compare(args.folder, args.golden, args.cp, lambda text: print(text, flush=True))  # noqa: T201
            return DONE if same else DIFFERS
        with _Written(args.target) as wrote:
            if args.command == "import":
                import_model(args.source, args.target, wrote)
            else:
                export_model(args.source, args.target, dtype=args.dtype, wrote=wrote)
    except (ValueError, NotImplementedError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m zigzag_jax.models.hf", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("import", help="a Hugging Face folder -> an imported one")
    command.add_argument("source", metavar="HF_DIR", help="folder with config.json and model*.safetensors")
    command.add_argument("target", metavar="OUT", help="folder to make")
    command = commands.add_parser("export", help="an imported folder or a training checkpoint -> a Hugging Face folder")
    command.add_argument("source", metavar="OUT_OR_CHECKPOINT", help="imported folder, run folder or checkpoint")
    command.add_argument("target", metavar="HF_DIR", help="folder to make")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="round to this; default: keep")
    command = commands.add_parser("check", help="compare logits and gradients with a golden file")
    command.add_argument("folder", metavar="HF_DIR", help="folder with config.json and weights")
    command.add_argument("--golden", metavar="FILE", required=True, help="see zigzag_jax/models/hf/golden.py")
    command.add_argument("--cp", type=int, default=1, help="devices of the ring (1)")
    command.add_argument("--cpu-devices", type=int, help="CPU devices where there is no GPU (as many as --cp)")
    return parser


class _Written:
    """Shows how much is written: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, target: str) -> None:
        self._target, self._console = target, Console(stderr=True, soft_wrap=True)
        self._bar = Progress(
            TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task, self._last_line = self._bar.add_task("", total=None), time.monotonic()

    def __enter__(self) -> Wrote:
        self._bar.start()
        return self._wrote

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            print(f"wrote {self._target}")  # noqa: T201

    def _wrote(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            self._console.print(f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB written", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
