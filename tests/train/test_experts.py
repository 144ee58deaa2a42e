"""Numbers of the experts' load, made by hand."""

import doctest

import numpy as np

from zigzag_jax.train.logs import experts
from zigzag_jax.train.logs.experts import expert_numbers

LOAD = np.array([[2, 2, 2, 2], [5, 3, 0, 0], [1, 3, 4, 0]], np.float32)
SPARSE = [False, True, True, False, True]


def test_by_layer_and_of_all():
    assert expert_numbers(1, LOAD, SPARSE) == {
        "expert_load": 2.5,
        "dead_experts": 3,
        "expert_load_by_layer": {"1": 1.0, "2": 2.5, "4": 2.0},
        "dead_experts_by_layer": {"1": 0, "2": 2, "4": 1},
    }


def test_layers_every_ten_steps():
    found = [step for step in range(1, 32) if "dead_experts_by_layer" in expert_numbers(step, LOAD, SPARSE)]
    assert found == [1, 11, 21, 31]
    assert expert_numbers(2, LOAD, SPARSE) == {"expert_load": 2.5, "dead_experts": 3}


def test_no_experts_and_no_tokens():
    assert expert_numbers(1, np.zeros((0, 4)), [False]) == {}
    assert expert_numbers(2, np.zeros((1, 4)), [True]) == {"expert_load": 0.0, "dead_experts": 4}


def test_the_examples():
    assert doctest.testmod(experts).failed == 0
