"""Pre-train DeepSeek-V2-Lite from random weights at 65,536 tokens a row, its latent on the ring.

    python -m zigzag_jax.train.tokenize --data TEXT --tokenizer FILE --out TOKENS     # once, on any machine
    srun -N 2 -n 16 --gpus-per-node=8 python examples/pretrain_deepseek_v2_lite.py --data TOKENS --out RUN
    JAX_PLATFORMS=cpu python examples/pretrain_deepseek_v2_lite.py --dry-run    # on any machine: bytes, hops, exchange

For 2 hosts of 8 H100 (80 GB): a cp ring of 4 inside a host, fsdp over 4 rings. A step is 8 rows, 0.5 M tokens. Any flag
of `python -m zigzag_jax.train` may be given too. srun starts one task a GPU, each of which must see all GPUs of its
host (docs/hosts.md).

What to expect: 3.7 GiB of float32 weights and 7.3 GiB of AdamW's moments a device. A hop is 36 MiB of latent (expanded
keys and values would be 260). A token is 42 GFLOPs of training at this length: at an MFU of 0.4 a step of 32,768 tokens
a device takes about 3.5 s. What has been measured is one H100 (docs/benchmarks.md); 16 devices have not.
"""

import sys

from zigzag_jax.train.__main__ import main
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig

RUN = Config(
    model="deepseek-v2-lite",
    steps=100_000,
    seq_len=65_536,
    batch=8,
    dtype="bfloat16",
    save_every=200,
    eval_every=500,
    mesh=MeshConfig(fsdp=4, cp=4, ep=4),
    optim=OptimConfig(learning_rate=4.2e-4, warmup=2000, schedule="wsd"),  # the rate of DeepSeek-V2's paper for Lite
)


if __name__ == "__main__":
    sys.exit(main(default=RUN, about=__doc__))
