"""Digests stand in the names of cached folders and in what lies there, so their values may not change."""

import doctest

from zigzag_jax.train.data import digest


def test_the_example():
    results = doctest.testmod(digest)
    assert results.attempted
    assert not results.failed
