"""The peer of bench_slice.py: the same slice in `transformers` on one GPU, with torch's own fast kernels.

    python examples/bench_transformers.py                 4 layers of Qwen3-30B-A3B, 32k tokens, forward and backward
    python examples/bench_slice.py --peer                 both, one after the other

bfloat16 parameters and gradients, grouped_mm experts, SDPA (which picks cuDNN or FlashAttention-2), a checkpoint around
every layer, cross-entropy over 4096 tokens at a time; median of 7 (clock.py). Nothing is timed where the loss is not
finite. Needs torch and transformers 5, and nothing of JAX on the GPU. --out DIR writes transformers.json and .png.
"""

import argparse
import dataclasses
import math
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # only the sizes and the FLOPs come from here

from bench import Report, flags
from bench_picture import Chart
from clock import Clock

from zigzag_jax.models.flops import H100_FLOPS, training_flops
from zigzag_jax.models.presets import PRESETS

CHUNK = 4096


def main(argv: list[str] | None = None) -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help=f"of the one sequence, a multiple of {CHUNK}")
    parser.add_argument("--peak", type=float, default=H100_FLOPS, help="FLOPs a second that MFU is measured against")
    flags(parser, quick=False)
    args = parser.parse_args(argv)
    if args.tokens % CHUNK:
        parser.error(f"--tokens must be a multiple of {CHUNK}, got {args.tokens}")
    try:
        import torch
        import transformers
    except ImportError as missing:
        parser.error(f"needs torch and transformers, got {missing}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU that torch can use, got none")
    from torch.utils.checkpoint import checkpoint

    sizes = dataclasses.replace(PRESETS[args.model], num_hidden_layers=args.layers)
    values = sizes.to_hf()
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.config._experts_implementation = "grouped_mm"
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = torch.randint(0, sizes.vocab_size, (1, args.tokens + 1), device="cuda")
    entropy = torch.nn.functional.cross_entropy

    def of_chunk(hidden, labels):
        return entropy((hidden @ model.lm_head.weight.T).float(), labels, reduction="sum")

    def gradient():
        model.zero_grad(set_to_none=True)
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[0]
        parts = zip(hidden.split(CHUNK), tokens[0, 1:].split(CHUNK), strict=True)
        loss = sum(checkpoint(of_chunk, *part, use_reentrant=False) for part in parts) / args.tokens
        loss.backward()
        return loss

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    report = Report("bench_transformers", argv, args.out, card=torch.cuda.get_device_name(), **versions)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    loss = gradient().item()
    if not math.isfinite(loss):
        print(f"Not timed: the loss is {loss}")
        return 1
    clock = Clock(7, 1, 0.3, lambda _: torch.cuda.synchronize())
    ms = clock.in_turn({"gradient": gradient})["gradient"]
    speed, peak = args.tokens / ms * 1e3, torch.cuda.max_memory_allocated() / 2**30
    mfu = training_flops(sizes, args.tokens) / (ms / 1e3) / args.peak
    row = {
        "by": "transformers", "pass": "gradient", "ms": ms, "tokens/s": speed, "MFU": mfu, "peak GiB": peak,
        "loss": loss, "tokens/s / peer": None,
    }  # fmt: skip
    report.add("slice", [row], Chart(("tokens/s",), ("pass",), ("by",)))
    return report.status


if __name__ == "__main__":
    sys.exit(main())
