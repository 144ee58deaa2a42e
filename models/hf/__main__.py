"""`python -m zigzag_jax.models.hf`: models from and to Hugging Face's folders, and whether they compute the same.

    import HF_DIR OUT                   stack the tensors as the models here have them, in the dtype of the files
    export OUT_OR_CHECKPOINT HF_DIR     write an imported model, or a training run's newest checkpoint, for transformers
    check HF_DIR --golden FILE          logits and gradients against those of a golden file, in float32

Exit codes: 0 done, 1 a tensor is over the bar, 2 a user's mistake (one line, nothing is written), 70 storage is away.
"""

import argparse
import sys

from rich.console import Console

from zigzag_jax.models.devices import start_ring, use_cpu_without_gpu
from zigzag_jax.models.errors import DONE, fail
from zigzag_jax.models.hf.golden import compare
from zigzag_jax.models.hf.saved import export_model, import_model
from zigzag_jax.models.progress import ByteBar

DIFFERS = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    use_cpu_without_gpu()
    try:
        if args.command == "check":
            start_ring(args.cp, args.cpu_devices)
            same = compare(args.folder, args.golden, args.cp, lambda text: print(text, flush=True))  # noqa: T201
            return DONE if same else DIFFERS
        with ByteBar("writing", "written", Console(stderr=True, soft_wrap=True)) as wrote:
            if args.command == "import":
                import_model(args.source, args.target, wrote)
            else:
                export_model(args.source, args.target, dtype=args.dtype, wrote=wrote)
        print(f"wrote {args.target}")  # noqa: T201
    except (ValueError, NotImplementedError, OSError) as error:
        return fail(error)
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


if __name__ == "__main__":
    sys.exit(main())
