"""A layer of experts of torch's grouped_mm, timed in a process of its own for bench_experts_layer.py.

As a good implementation in torch does it: gate and up as one matmul, pairs sorted by expert once, rows gathered, the
router's weight after `down`, the k results of a token added. Reads from stdin, as JSON: tokens, experts, top_k, size,
inner, dtype, samples, repeats, idle. Prints the milliseconds of a forward and of a forward with all gradients.
"""

import json
import sys

import torch
from clock import Clock


def main() -> None:
    """One layer."""
    job = json.load(sys.stdin)
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    on = {"device": "cuda", "dtype": getattr(torch, job["dtype"])}
    tokens, experts, k, size, inner = (job[name] for name in ("tokens", "experts", "top_k", "size", "inner"))
    normal = lambda *shape: (torch.randn(*shape, **on) * shape[-2] ** -0.5).requires_grad_()
    x = torch.randn(tokens, size, **on).requires_grad_()
    route, gate_up, down = normal(size, experts), normal(experts, size, 2 * inner), normal(experts, inner, size)
    dy = torch.randn(tokens, size, **on)
    clock = Clock(job["samples"], job["repeats"], job["idle"], lambda _: torch.cuda.synchronize())

    def layer():
        probs = torch.softmax((x @ route).float(), dim=-1)
        weights, chosen = torch.topk(probs, k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        order = torch.argsort(chosen.flatten(), stable=True)
        offsets = torch.bincount(chosen.flatten(), minlength=experts).cumsum(0).to(torch.int32)
        gate, up = grouped(x[order // k], gate_up, offs=offsets).chunk(2, dim=-1)
        rows = grouped(torch.nn.functional.silu(gate) * up, down, offs=offsets)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device="cuda")
        return (rows[back].view(tokens, k, size) * weights[:, :, None]).sum(1)

    def forward():
        with torch.no_grad():
            return layer()

    both = lambda: torch.autograd.grad(layer(), (x, route, gate_up, down), dy)
    print(json.dumps(clock.in_turn({"forward": forward, "both": both}) | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
