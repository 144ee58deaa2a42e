"""Which GPU the tests have."""

import jax

GPU = jax.default_backend() == "gpu"
HOPPER = GPU and jax.devices()[0].compute_capability == "9.0"
