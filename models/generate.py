"""`python -m zigzag_jax.models.generate FOLDER --prompt TEXT`: hear whether a model speaks.

FOLDER is Hugging Face's, an imported one, or a training run (its newest checkpoint), with a tokenizer.json beside the
weights. The prompt goes through the ring over --cp devices of this process, however long it is; then it is token by
token (decode.py).
"""

import argparse
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from zigzag_jax.models.config import read_json
from zigzag_jax.models.decode import Writer, write
from zigzag_jax.models.devices import ring_mesh, start_ring, use_cpu_without_gpu
from zigzag_jax.models.errors import DONE, fail
from zigzag_jax.models.hf.saved import open_source, read_state
from zigzag_jax.models.progress import ByteBar
from zigzag_jax.models.registry import model_of, read_config
from zigzag_jax.models.sharding import Sharding, abstract_state
from zigzag_jax.models.tokenizer import read_tokenizer


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    use_cpu_without_gpu()
    try:
        _continue(args)
    except (ValueError, NotImplementedError, OSError) as error:
        return fail(error)
    return DONE


def _continue(args: argparse.Namespace) -> None:
    _check(args)
    start_ring(args.cp, args.cpu_devices)
    source = open_source(args.folder)
    config = read_config(source.config)
    tokenizer = read_tokenizer(args.tokenizer or source.beside / "tokenizer.json")
    text = Path(args.prompt_file).read_text("utf-8") if args.prompt_file else args.prompt
    prompt = [*_begin(source.beside, tokenizer), *tokenizer.encode(text).ids]
    if not prompt:
        raise ValueError(f"prompt: must hold a token, got {text!r}")
    ends = _ends(source.config, source.beside)
    if max(prompt) >= config.vocab_size:
        raise ValueError(f"tokenizer: ids must be under the model's {config.vocab_size}, got {max(prompt)}")
    where, dtype = Sharding(ring_mesh(args.cp)), jnp.dtype(args.dtype)
    build = functools.partial(model_of(config), config, dtype=dtype, router_bias=source.router_bias)
    make = lambda sharding: lambda rngs: build(sharding, rngs=rngs)
    sys.stderr.write("reading weights\n")
    with ByteBar("reading weights", "read", Console(stderr=True)) as told:
        params = read_state(source, config, abstract_state(make(where))[1], where, dtype, told)
    print(text, end="", flush=True)  # noqa: T201
    shown: list[int] = []
    told = functools.partial(_tell, tokenizer, shown)
    ids = write(
        Writer(make, where), params, [prompt], args.tokens, temperature=args.temperature, top_p=args.top_p,
        seed=args.seed, ends=ends, told=told,
    )  # fmt: skip
    print(f"\n[{len(prompt)} tokens given, {len(ids[0])} written]")  # noqa: T201


def _tell(tokenizer: Tokenizer, shown: list[int], new: np.ndarray) -> None:
    """Print what the new token adds: a token may be half a character, so the whole is decoded each time."""
    whole = lambda: tokenizer.decode(shown).rstrip("\ufffd")
    before = len(whole())
    shown.append(int(new[0]))
    print(whole()[before:], end="", flush=True)  # noqa: T201


def _check(args: argparse.Namespace) -> None:
    for name, rule, holds in (
        ("tokens", "must be >= 1", args.tokens >= 1),
        ("temperature", "must be >= 0", args.temperature >= 0),
        ("top-p", "must be > 0 and <= 1", 0 < args.top_p <= 1),
    ):
        if not holds:
            raise ValueError(f"{name}: {rule}, got {vars(args)[name.replace('-', '_')]}")


def _begin(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """The token a text begins with, where tokenizer_config.json asks for one and tokenizer.json does not add it."""
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    token = values.get("bos_token")
    token = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(token) if values.get("add_bos_token") and token else None
    return [] if number is None or number in tokenizer.encode("a").ids else [number]


def _ends(config: Mapping[str, Any], folder: Path) -> list[int]:
    """The tokens that end a text, by config.json and by generation_config.json, which may know more (a turn's end)."""
    file, found = folder / "generation_config.json", []
    for values in (config, read_json(file) if file.is_file() else {}):
        end = values.get("eos_token_id")
        found += end if isinstance(end, list) else [] if end is None else [end]
    if wrong := [end for end in found if not isinstance(end, int)]:
        raise ValueError(f"eos_token_id must be a number or a list of numbers, got {wrong[0]!r}")
    return list(dict.fromkeys(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m zigzag_jax.models.generate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", metavar="FOLDER", help="a Hugging Face folder, an imported one, a run or a checkpoint"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="text to continue")
    text.add_argument("--prompt-file", metavar="FILE", help="a file with the text, however long")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one in FOLDER)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest with this probability (1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of weights and arithmetic"
    )
    parser.add_argument("--cp", type=int, default=1, help="devices of the ring (1)")
    parser.add_argument("--cpu-devices", type=int, help="CPU devices where there is no GPU (as many as --cp)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
