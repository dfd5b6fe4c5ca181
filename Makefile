# Two commands, on any machine with make and Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: env demo test train-smoke aot bench gpu-test gpu-sanitize gpu-bench clean

env: $(STAMP)

# The stamp is touched last: an interrupted install starts over.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	sys.exit(None if sys.version_info >= (3, 11) else "osdn needs Python 3.11 or newer, and $(PYTHON) is " + v + "; try: make env PYTHON=python3.12")'
	@echo "installing into .venv: a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env
	$(BIN)/osdn compare

# One thread a worker: the tests' tensors are small, and threads of several workers would fight over the cores.
test: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS)
	tools/check_wheel.sh $(BIN)/python

# A language model on the standard library's sources, or on DATA="PATH...": trained, evaluated on the documents that were
# left out, and going on with a text. A run that was stopped goes on; delete runs/smoke to repeat one.
train-smoke: env
	$(BIN)/osdn train tiny_text_cpu --out runs/smoke $(if $(DATA),--data $(DATA))
	$(BIN)/osdn eval runs/smoke/model --out runs/smoke/eval --tasks perplexity --held-out 0.1 --limit 32 \
	--block-size 1024 --bucket-size 256 --text $(or $(DATA),"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')/*.py")
	$(BIN)/osdn generate runs/smoke/model --prompt "    def __init__(self" --max-new-tokens 200 --temperature 0.7

# Every kernel in every config, for GPUs that need not be here; `make test` compiles one config per kernel and decay.
aot: env
	$(BIN)/python -m osdn.ops.triton.aot --all --workers $(WORKERS)

bench: env
	$(BIN)/python -m osdn.bench --suite cpu

# On a CUDA machine, with the interpreter it has, which needs torch, triton, transformers and pytest; no venv. What needs
# two GPUs, or what osdn[train] brings, is skipped where they are missing, with the reason.
gpu-test:
	@$(PYTHON) -c 'import sys, torch; \
	sys.exit(None if torch.cuda.is_available() else f"gpu-test needs a CUDA device, and torch {torch.__version__} sees none")'
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m pytest -rs tests/ops/test_triton.py tests/ops/test_step.py \
	tests/ops/test_conv_kernels.py tests/ops/test_chunked.py tests/train/test_fsdp.py tests/train/test_sharded.py

# Reads and writes out of bounds, and races, in minutes for each decay: compute-sanitizer comes with CUDA's toolkit.
gpu-sanitize:
	for tool in "memcheck --report-api-errors no" racecheck; do for decay in none scalar channel; do \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=src:$$PYTHONPATH \
	compute-sanitizer --error-exitcode 1 --tool $$tool $(PYTHON) tests/ops/sanitize.py $$decay || exit 1; done; done

# As gpu-test, and tyro. BENCH selects, since peers tune for minutes: make gpu-bench BENCH="--only 'osdn*' --limit 540".
gpu-bench:
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m osdn.bench --suite gpu $(BENCH)

clean:
	rm -rf .venv build dist src/osdn.egg-info .mypy_cache .ruff_cache .hypothesis
