"""How evenly the experts are used, of the router statistics that each step brings along: nothing more is computed.

A layer of E experts whose batch chose them n_0 .. n_E-1 times has the *load* max(n) / mean(n): 1 where all are chosen
equally often, E where one is chosen always. An expert that no token of the batch chose is *dead* in it: it learns
nothing in this step. A few are by chance in small batches; the same ones again and again are lost.
"""

from collections.abc import Mapping, Sequence

import numpy as np

_LAYERS_EVERY = 10  # steps: the numbers of 48 layers are several times all others, and a run may have a million steps


def expert_numbers(
    step: int, load: np.ndarray, sparse_layers: Sequence[bool]
) -> dict[str, float | Mapping[str, float]]:
    """Of `load` [MoE layers, E], how often each was chosen; `sparse_layers` says which of all layers have experts.

    Of the whole model at every step; at steps 1, 11, 21, .. by the number of the layer, from 0, too. Empty without
    experts.

    >>> expert_numbers(1, np.array([[2.0, 2], [4, 0]]), [False, True, True])["expert_load_by_layer"]
    {'1': 1.0, '2': 2.0}
    """
    if not load.size:
        return {}
    uneven = load.max(axis=1) / np.maximum(load.mean(axis=1), 1.0)  # a batch of nothing but pads has load 0
    dead = (load == 0).sum(axis=1)
    found: dict[str, float | Mapping[str, float]] = {
        "expert_load": float(uneven.max()),
        "dead_experts": int(dead.sum()),
    }
    if step % _LAYERS_EVERY == 1:
        numbers = [str(n) for n, sparse in enumerate(sparse_layers) if sparse]
        found["expert_load_by_layer"] = dict(zip(numbers, uneven.astype(float).round(4).tolist(), strict=True))
        found["dead_experts_by_layer"] = dict(zip(numbers, dead.tolist(), strict=True))
    return found
