"""Compiling does not grow with cp: seconds and instructions of a ring's program for H100s that are not there.

    JAX_PLATFORMS=cpu python examples/scale_compile.py                          cp 2 to 64, forward and backward
    JAX_PLATFORMS=cpu python examples/scale_compile.py --implementation reference --cp 8 64

Up to cp 5 forward and 6 backward the ring is straight-line code, a kernel call a step; from there on it is a loop of
two steps an iteration, with what is left over outside: for each parity of cp one program, whatever its size. Needs the
CUDA plugin (environment .venv-aot).
"""

import argparse
import sys
import time

from bench import table
from read_schedule import attention


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cp", type=int, nargs="+", default=(2, 4, 8, 16, 32, 64))
    parser.add_argument("--length", type=int, default=8192, help="tokens a rank")
    parser.add_argument("--implementation", default="mosaic")
    args = parser.parse_args(argv)
    if wrong := [cp for cp in args.cp if cp < 1]:
        parser.error(f"--cp must be >= 1, got {wrong[0]}")
    if args.length < 2 or args.length % 2:
        parser.error(f"--length must be even, got {args.length}")
    rows = []
    for cp in args.cp:
        begin = time.process_time()
        program = attention(cp, args.length, implementation=args.implementation)
        loops = [f"{times:g}" for _, times in program.launched() if times > 1]
        permutes = [flight for flight in program.flights() if flight.kind == "collective-permute"]
        rows.append({
            "cp": cp, "CPU s": time.process_time() - begin, "instructions": len(program),
            "permutes in the text": len(permutes), "run": int(sum(f.times for f in permutes)),
            "trips": ", ".join(loops) if args.implementation != "reference" else "",
        })  # fmt: skip
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
