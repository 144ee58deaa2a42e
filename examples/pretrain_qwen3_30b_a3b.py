"""Pre-train Qwen3-30B-A3B from random weights at 131,072 tokens a row.

    python -m zigzag_jax.train.tokenize --data TEXT --tokenizer FILE --out TOKENS     # once, on any machine
    srun -N 8 -n 64 --gpus-per-node=8 python examples/pretrain_qwen3_30b_a3b.py --data TOKENS --out RUN
    JAX_PLATFORMS=cpu python examples/pretrain_qwen3_30b_a3b.py --dry-run     # on any machine: bytes, hops, exchange

For 8 hosts of 8 H100 (80 GB). A host is one cp ring, so that keys, values and most routed rows stay on NVLink; fsdp
runs over the hosts. A step is 8 rows, 1.05 M tokens. Any flag of `python -m zigzag_jax.train` may be given too. srun
starts one task a GPU, each of which must see all GPUs of its host (docs/hosts.md).

What to expect: 1.8 GiB of float32 weights and 3.6 GiB of AdamW's moments a device. A token is 173 GFLOPs of training at
this length, nine tenths of them attention: at an MFU of 0.4 a step of 16,384 tokens a device takes about 7 s. What has
been measured is four layers at 32k tokens on one H200 (69,500 tokens/s, docs/benchmarks.md); 64 devices have not.
"""

import sys

from zigzag_jax.train.__main__ import main
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig, RouterConfig

RUN = Config(
    model="qwen3-30b-a3b",
    steps=100_000,
    seq_len=131_072,
    batch=8,
    dtype="bfloat16",
    save_every=200,
    eval_every=500,
    mesh=MeshConfig(fsdp=8, cp=8, ep=8),
    # wsd: a run stopped before the rate comes down is the beginning of any longer one
    optim=OptimConfig(learning_rate=3e-4, warmup=2000, schedule="wsd", z_loss=1e-4),
    router=RouterConfig(aux_loss="sequence"),  # the same loss whatever --accumulate is
)


if __name__ == "__main__":
    sys.exit(main(default=RUN, about=__doc__))
