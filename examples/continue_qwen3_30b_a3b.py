"""Train on from Qwen3-30B-A3B's published weights at 131,072 tokens a row.

    hf download Qwen/Qwen3-30B-A3B-Base --local-dir HF
    python -m zigzag_jax.train.tokenize --data TEXT --tokenizer HF --out TOKENS       # once, on any machine
    srun -N 4 -n 32 --gpus-per-node=8 python examples/continue_qwen3_30b_a3b.py --model HF --data TOKENS --out RUN
    python -m zigzag_jax.models.hf export RUN OUT                      # the newest checkpoint, for transformers

The weights go straight into the mesh, each host reading its own part; sizes, rotary scaling and tokenizer are the
folder's. Beyond the length that the model was trained for, give its config.json the rope scaling that its
authors name (yarn, factor 4 for 131,072 tokens) before the start.

For 4 hosts of 8 H100 (80 GB): a host is one cp ring. A step is 4 rows, 0.5 M tokens. Any flag of
`python -m zigzag_jax.train` may be given too. srun starts one task a GPU, each of which must see all GPUs of its host
(docs/hosts.md).

What to expect: 3.6 GiB of float32 weights and 7.1 GiB of AdamW's moments a device; a step of 16,384 tokens a device
takes about 7 s at an MFU of 0.4 (173 GFLOPs a token). The first loss is that of the published model on your text.
Tried with tiny models only.
"""

import sys

from zigzag_jax.train.__main__ import main
from zigzag_jax.train.config import Config, MeshConfig, OptimConfig, RouterConfig

RUN = Config(
    model="",  # --model HF
    steps=2000,
    seq_len=131_072,
    batch=4,
    dtype="bfloat16",
    save_every=100,
    eval_every=100,
    mesh=MeshConfig(fsdp=4, cp=8, ep=8),
    optim=OptimConfig(learning_rate=1e-5, warmup=100, b2=0.98),
    router=RouterConfig(aux_loss="sequence"),
)


if __name__ == "__main__":
    sys.exit(main(default=RUN, about=__doc__))
