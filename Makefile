# make demo            a low-dose CT through the node into a PACS, on this machine; see README.md
# make demo CT=folder  the same with DICOM CT of your own
# make test            all tests, from nothing
# make lint            style, types, layers
#
# Variables: PYTHON   interpreter for a new environment (3.11 or newer)
#            TORCH    what pip installs where no torch can be imported yet
#            PIPELINE what the demo denoises with
PYTHON   ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV     ?= .venv
# The build for the CPU: the one on PyPI brings gigabytes of GPU libraries that the node does not use.
TORCH    ?= $(if $(filter Linux,$(shell uname -s)),torch==2.13.0+cpu,torch==2.13.0)
PIPELINE ?= fast-2.5d
CT       ?=

# More than two cores have: most tests wait for silence or a deadline. Files stay whole, they share fixtures; they run
# in their order, or xdist would leave those with few and long tests to the end.
TESTERS      := 4
# Where tests write. They sync thousands of files and transactions, for which a disk takes its time; memory has to hold
# 300 MB of real series, and what is made of them.
SCRATCH      := $(shell df -k /dev/shm 2>/dev/null | cat - /proc/meminfo 2>/dev/null | awk '$$6 == "/dev/shm" { free = $$4 } \
                    $$1 == "MemAvailable:" && $$2 < free { free = $$2 } END { print (free > 8e6 ? "/dev/shm" : "/tmp") }')
# Testers share the cores: threads of PyTorch that wait for each other would take half of them. A worker of the node is
# given a number of its own. Hundreds of processes start: what Python compiles is kept, whatever the environment says.
TEST_ENV     := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
TORCH_WHEELS := https://download.pytorch.org/whl/cpu
PEERS        := Orthanc:orthanc storescu:dcmtk dciodvfy:dicom3tools strace:strace
# Debian installs Orthanc to /usr/sbin, which is not on every user's path.
export PATH  := $(PATH):/usr/sbin
BIN          := $(VENV)/bin
HAS_TORCH    := -c "import sys, torch; sys.exit(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6))" >/dev/null 2>&1

.PHONY: demo test lint peers
.DEFAULT_GOAL := demo

demo: $(VENV)/.for-demo
	$(BIN)/python -m demo --pipeline '$(PIPELINE)' $(if $(CT),--ct '$(CT)')

test: $(VENV)/.for-tests peers
	scratch=$$(mktemp -d $(SCRATCH)/dicomnode-XXXXXX) && $(TEST_ENV) PYTEST_DEBUG_TEMPROOT=$$scratch \
	    $(BIN)/python -m pytest -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder && rm -r $$scratch

lint: $(VENV)/.for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

# A torch that the interpreter has already is used, not installed a second time.
$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'No python3 found: install Python 3.11 or newer, or say make PYTHON=/path/to/python3.11'; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or newer is needed; $(PYTHON) is older. Say make PYTHON=/path/to/python3.11'; exit 1; }
	@if '$(PYTHON)' $(HAS_TORCH); then \
	    echo 'making $(VENV), with the torch of $(PYTHON)'; '$(PYTHON)' -m venv --system-site-packages $(VENV); \
	else \
	    echo 'making $(VENV)'; '$(PYTHON)' -m venv $(VENV); \
	fi || { rm -rf $(VENV); echo 'No environment could be made; on Debian: apt install python3-venv'; exit 1; }

# What is there afterwards is written down as a constraint, so that nothing replaces it later.
$(VENV)/.torch: | $(BIN)/python
	@if $(BIN)/python $(HAS_TORCH); then \
	    echo 'torch is there already and is kept'; \
	else \
	    echo 'installing $(TORCH)'; \
	    $(BIN)/pip install --quiet '$(TORCH)' 2>/dev/null || \
	    $(BIN)/pip install --extra-index-url $(TORCH_WHEELS) '$(TORCH)' || \
	    { echo 'torch could not be installed; see "A torch of your own" in README.md'; exit 1; }; \
	fi
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >$@

$(VENV)/.for-demo: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --constraint $(VENV)/.torch --editable '.[train]'
	@touch $@

$(VENV)/.for-tests: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install --quiet --constraint $(VENV)/.torch --editable '.[train,test,lint]'
	@touch $@ $(VENV)/.for-demo

# Real peers for the tests. Without root and apt the tests that need them skip, or fail if CI is set.
peers:
	@missing=''; \
	for pair in $(PEERS); do command -v "$${pair%%:*}" >/dev/null || missing="$$missing $${pair##*:}"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "installing$$missing"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	else \
	    echo "not installed, and no apt with root rights:$$missing (tests that need them are skipped)"; \
	fi
