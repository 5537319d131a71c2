# Needs make and Python 3.11 or newer, nothing else: each goal sets up what it needs, once, in .venv.
#
#   make demo     a face-recognition pipeline over an edge, a fog and a cloud node, for half a minute
#   make test     the tests, in two processes; PYTEST_ARGS=--cov shows their coverage, too
#   make test-kubernetes  the tests on Kubernetes: an API server alone (test-kubernetes-api), and with nodes
#                 (test-kubernetes-nodes): a thousand faked ones, and a real cluster of three that it brings up (as root
#                 on Debian; the first time that takes 15 minutes more). With KUBECONFIG set, the cluster that it
#                 names is used, by the tests that need no control over nodes
#   make lint     style, types and the layers
#   make bench    the benchmarks
#   make cluster  Nomad on a Kubernetes cluster on this machine, made by kind; needs Docker, kind and kubectl
#   make clean    remove .venv, caches and build results
#
# PYTHON=/path/to/python3 chooses the Python of a new .venv, DEMO_SECONDS=60 the length of the demo.

PYTHON ?=
DEMO_SECONDS ?= 30
PYTEST_ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMPS := .venv/stamps

# Where it is set, every pod compiles Nomad anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-kubernetes test-kubernetes-api test-kubernetes-nodes kubernetes lint bench cluster clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMPS)/examples
	@$(BIN)/python examples/demo.py --seconds $(DEMO_SECONDS)

test: $(STAMPS)/examples $(STAMPS)/test
	@echo "Left out: the tests marked 'slow', and those marked 'kubernetes', which 'make test-kubernetes' runs."
	$(BIN)/python -m pytest -m "not slow and not kubernetes" -n 2 --dist worksteal --durations=10 $(PYTEST_ARGS)

# Each of the two remembers by itself what failed: `make test-kubernetes-api PYTEST_ARGS=--last-failed`.
test-kubernetes: test-kubernetes-api test-kubernetes-nodes

test-kubernetes-api: kubernetes
	$(BIN)/python -m pytest -m kubernetes tests/kubernetes --ignore-glob='*/test_real_*' --ignore-glob='*/test_scale_*' \
	    -o cache_dir=.pytest_cache/$@ -n 2 --dist loadfile --durations=10 $(PYTEST_ARGS)

# They have the cluster, and the machine, to themselves.
test-kubernetes-nodes: kubernetes
	$(BIN)/python -m pytest -m kubernetes tests/kubernetes/test_scale_*.py tests/kubernetes/test_real_*.py \
	    -o cache_dir=.pytest_cache/$@ --durations=10 $(PYTEST_ARGS)

kubernetes: $(STAMPS)/examples $(STAMPS)/test
	@$(BIN)/python -m tests.kubernetes.cluster.prepare

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

bench: $(STAMPS)/test
	$(BIN)/python -m benchmarks.data_path
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.idle
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.submit
	$(BIN)/python -m benchmarks.placement
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.moves

# The operators' Python is the one that submits: code goes from this version to that.
cluster: $(STAMPS)/examples
	@command -v kind >/dev/null || { echo "kind isn't installed: https://kind.sigs.k8s.io" >&2; exit 1; }
	kind get clusters | grep -qx nomad || kind create cluster --name nomad --config images/kind.yaml --wait 120s
	@version=$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])') && set -ex && \
	images/build.sh --python $$version --extras examples && \
	kind load docker-image --name nomad nomad-master:dev nomad-operator:dev-py$$version && \
	export CONTEXT=kind-nomad && images/k8s/init.sh && \
	OPERATOR_IMAGES=$$version=nomad-operator:dev-py$$version images/k8s/startup.sh

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* htmlcov

# One stamp for each extra of the package that is installed; a change of setup.cfg installs it again.
$(STAMPS)/%: $(STAMPS)/venv setup.cfg pyproject.toml
	@echo "Installing Nomad with what '$*' needs into .venv ..."
	@$(INSTALL) --editable '.[$*]'
	@touch $@

$(STAMPS)/venv:
	@found=""; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "Nomad needs Python 3.11 or newer; found: $$($(or $(PYTHON),python3) --version 2>&1)." \
	         "Name one with 'make PYTHON=/path/to/python3 ...'." >&2; exit 1; \
	fi; \
	"$$found" -m venv .venv || { \
	    echo "$$found can't make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@mkdir -p $(STAMPS) && touch $@
