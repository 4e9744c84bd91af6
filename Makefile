# make setup · demo · test · sanitize · lint · bench · doctor · gpu · clean
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-native test-triton test-rest sanitize lint format bench doctor gpu clean

setup: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace

.venv/ready: .ci/requirements.txt
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info < (3, 14), "llmsys needs Python 3.10 to 3.13, this is " + sys.version.split()[0]'
	@command -v c++ > /dev/null || { echo "llmsys needs a C++17 compiler: none found as c++ (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r .ci/requirements.txt
	touch $@

demo: setup
	$(BIN)/python -m llmsys train demo --compare

# Three runs, two at a time, each printed at its end. Threads that wait sleep, since two processes share the cores.
test: setup
	OMP_WAIT_POLICY=passive $(MAKE) -j2 --no-print-directory --output-sync=target test-native test-triton test-rest

test-native:
	$(BIN)/python -m pytest -q tests/ops -k "not triton"
test-triton:
	$(BIN)/python -m pytest -q tests/ops tests/triton -k triton
test-rest:
	$(BIN)/python -m pytest -q --ignore=tests/ops --ignore=tests/triton

# The op tests under AddressSanitizer and UndefinedBehaviorSanitizer. Ten minutes to build the first time.
sanitize: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_WAIT_POLICY=passive $(BIN)/python -m tests.sanitized

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

bench: setup
	$(BIN)/python -m llmsys bench ops --bars

doctor: setup
	$(BIN)/python -m llmsys doctor

# On a machine with a GPU and its own torch, Triton and pytest-xdist: make gpu PYTHON=python3
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n auto tests/ops -k "not simt and not emulated"
	$(PYTHON) -m llmsys doctor --record
	$(PYTHON) -m llmsys bench ops --device cuda --budget 0.3 --record

clean:
	rm -rf build dist *.egg-info llmsys/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks
