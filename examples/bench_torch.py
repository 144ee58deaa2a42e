"""torch's grouped_mm, timed in a process of its own for bench_experts.py: two frameworks do not share a card's memory.

Reads from stdin, as JSON: rows, k, n, sizes, dtype, samples, repeats, idle. Prints the milliseconds of a forward and of
a forward with its gradients.
"""

import json
import sys

import torch
from clock import Clock


def main() -> None:
    """One shape."""
    job = json.load(sys.stdin)
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    on = {"device": "cuda", "dtype": getattr(torch, job["dtype"])}
    x = torch.randn(job["rows"], job["k"], **on).requires_grad_()
    w = (torch.randn(len(job["sizes"]), job["k"], job["n"], **on) * job["k"] ** -0.5).requires_grad_()
    dy = torch.randn(job["rows"], job["n"], **on)
    offsets = torch.tensor(job["sizes"], device="cuda").cumsum(0).to(torch.int32)
    clock = Clock(job["samples"], job["repeats"], job["idle"], lambda _: torch.cuda.synchronize())

    def forward():
        with torch.no_grad():
            return grouped(x, w, offs=offsets)

    both = lambda: torch.autograd.grad(grouped(x, w, offs=offsets), (x, w), dy)
    print(json.dumps(clock.in_turn({"forward": forward, "both": both}) | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
