"""Train on from DeepSeek-V2-Lite's published weights at 131,072 tokens a row.

    hf download deepseek-ai/DeepSeek-V2-Lite --local-dir HF
    python -m zigzag_jax.train.tokenize --data TEXT --tokenizer HF --out TOKENS       # once, on any machine
    srun -N 1 -n 8 --gpus-per-node=8 python examples/continue_deepseek_v2_lite.py --model HF --data TOKENS --out RUN
    python -m zigzag_jax.models.hf export RUN OUT                      # the newest checkpoint, for transformers

The weights go straight into the mesh, each host reading its own part; sizes, rotary scaling and tokenizer are the
folder's.

For one host of 8 H100 (80 GB), one cp ring. A step is one row. Any flag of `python -m zigzag_jax.train` may be
given too. srun starts one task a GPU, each of which must see all GPUs of the host (docs/hosts.md).

What to expect: 7.3 GiB of float32 weights and 15 GiB of AdamW's moments a device; a step of 16,384 tokens a device
takes about 3 s at an MFU of 0.4 (69 GFLOPs a token). The published model was stretched to 32k by yarn and takes the
rest of the length from your text. Tried with tiny models only.
"""

import sys

from zigzag_jax.train.__main__ import main
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig

RUN = Config(
    model="",  # --model HF
    steps=2000,
    seq_len=131_072,
    batch=1,
    dtype="bfloat16",
    save_every=100,
    eval_every=100,
    mesh=MeshConfig(cp=8, ep=8),
    optim=OptimConfig(learning_rate=1e-5, warmup=100, b2=0.98),
)


if __name__ == "__main__":
    sys.exit(main(default=RUN, about=__doc__))
