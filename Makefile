# make train    set everything up and train a small MoE language model over a cp ring; again: it resumes
# make test    set everything up and pass the tests, one deviceless compile for GPUs among them (15 minutes at most on two cores)
# make check   what takes longer: all compiles for GPUs, docs, slow tests, the wheel with the newest jax (30 minutes at most)
# make docs    the docs site, in site/
# make train ARGS="--steps 1000 --mesh.cp 4"     any flag of python -m zigzag_jax.train
# make test ARGS="tests/test_ring.py -k cp4"     a part

.PHONY: setup train test schedule lint check docs clean


setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt scripts/setup
	@scripts/setup

.venv-aot/.ready: .venv/.ready scripts/setup_aot
	@scripts/setup_aot

train: setup
	@.venv/bin/python -m zigzag_jax.train $(ARGS)

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright

test: lint $(if $(ARGS),,schedule)
	JAX_PLATFORMS=cpu scripts/quick .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not aot and not byhand" $(or $(ARGS),tests)

# The CUDA compiler exists for Linux only.
schedule: $(if $(filter Linux,$(shell uname -s)),.venv-aot/.ready)
	@if [ -e .venv-aot/.ready ]; then JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -n 2 -m "aot and not slow" $$(grep -rl --include="test_*.py" mark.aot tests); \
	else echo "no Linux: what needs the CUDA compiler is not tested here"; fi

check: setup
	scripts/check

# The pages as a site, in site/; open site/index.html.
docs: setup
	scripts/docs

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .ruff_cache
