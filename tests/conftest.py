"""Every test sees eight CPU devices, and a silent broadcast over ranks is an error."""

import gc

import jax

gc.set_threshold(200_000, 20, 50)  # programs that are kept for later tests are many objects, and none is garbage
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
