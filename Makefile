# `make demo` and `make test` set up everything they need. Where no virtual environment is active
# they create .venv; an active one is used as it is.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/.stamina-installed
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh tests/kernels/cuda/*.h)

.PHONY: demo test bench lint aot sanitize format clean

demo: $(INSTALLED)
	rm -rf demo-output
	$(VENV)/bin/stamina demo --output demo-output

# a process for each core, four at most: most tests keep one core busy
test: $(INSTALLED)
	$(PYTHON) -m pytest -n auto --maxprocesses 4 --dist worksteal $(TEST_ARGS)

# e.g. `make bench SUITE=linear BENCH_ARGS=--quick`
SUITE ?= linear
bench: $(INSTALLED)
	$(PYTHON) -m benchmarks run $(SUITE) --json bench-$(SUITE).json $(BENCH_ARGS)
	$(PYTHON) -m benchmarks plot bench-$(SUITE).json --output bench-output

aot: $(INSTALLED)
	$(PYTHON) -m pytest -m aot --all-archs tests/kernels

# The C++ backend with AddressSanitizer and UndefinedBehaviorSanitizer, then with ThreadSanitizer.
sanitize: $(INSTALLED)
	$(PYTHON) tests/kernels/sanitize.py

lint: $(INSTALLED)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# torch first: the extension builds against the torch that will load it.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q -c constraints.txt torch setuptools wheel ninja
	$(PYTHON) -m pip install -q --no-build-isolation -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build demo-output stamina_kernels/*.so *.egg-info
