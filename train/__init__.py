"""The trainer: `python -m zigzag_jax.train`."""
