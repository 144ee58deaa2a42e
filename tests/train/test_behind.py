"""Who holds the others up."""

from zigzag_jax.train.hosts.behind import behind


def test_who_is_behind():
    assert behind({0: (5, "computing step"), 1: (5, "computing step"), 2: None}) == ""
    found = behind({0: (5, "computing step"), 1: (5, "reading the batch of step"), 2: (5, "computing step")})
    assert found == "process 1: reading the batch of step 5, the others are elsewhere"
    assert behind({0: (5, "computing step"), 1: (4, "saving after step")}).startswith("process 1: saving after step 4")
