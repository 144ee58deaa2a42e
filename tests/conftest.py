"""Every test sees eight CPU devices, and a silent broadcast over ranks is an error."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
