# Two commands for newcomers: `make quickstart` and `make test`. Both set up .venv first, once.
# pip says errors only (-qq): its warnings are about this machine's configuration.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
READY := $(VENV)/.ready
RUN := runs/quickstart

.PHONY: quickstart test test-slow test-promise test-browser test-chaos test-hostile test-gpu test-trl bench bench-check bench-gpu check docs schema models-supported features golden clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "myllm_ray needs Python 3.11 or later: make PYTHON=python3.11")'
	@echo "Installing into $(VENV): once, it takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## a small language model on Python's standard library, through Ray, then three samples
	$(BIN)/python jobs/train.py --config configs/quickstart.yaml checkpoint.resume=never run.overwrite=true
	$(BIN)/myllm-ray sample $(RUN) --max-new-tokens 48 --temperature 0.5 -p 'def __init__(self' -p 'import ' -p '    """Return '
	@echo
	@echo "What to try next:"
	@echo "  $(BIN)/myllm-ray chat $(RUN)             continues what you type, as it was trained on code and not on chats"
	@echo "  $(RUN)/report.html                               the curves of the run, in a browser"
	@echo "  $(BIN)/myllm-ray train configs/tiny_sft.yaml     fine-tuning; every config in configs/ is a start"

# Two processes: most tests wait for processes of their own half of the time. How they share the tests: tests/conftest.py.
TWO := -n 2 --no-loadscope-reorder

test: $(READY)  ## the tests without a marker of pyproject.toml (slow, promise, chaos, hostile, bench, gpu, browser)
	$(BIN)/python -m pytest $(TWO)

test-slow: $(READY)  ## all that is slow
	$(BIN)/python -m pytest $(TWO) -m 'slow or promise' --timeout 3600

test-promise: $(READY)  ## what guards the promise, on every backend and in Ray
	$(BIN)/python -m pytest $(TWO) -m promise --timeout 3600

test-chaos test-hostile test-gpu: test-%: $(READY)  ## as the markers in pyproject.toml say
	$(BIN)/python -m pytest -m $* --timeout 3600

test-browser: $(READY)  ## the HTML pages in a headless Chromium (Debian: apt-get install chromium chromium-driver)
	$(BIN)/python -m pytest -m browser

test-trl: $(READY)  ## the losses of TRL beside ours; needs the extra bench
	$(BIN)/python -m pytest -m bench --timeout 3600

bench: $(READY)  ## this package beside a bare loop, HF Trainer, TRL and Ray: the table of docs/performance.md
	@mkdir -p runs
	$(BIN)/python benchmarks/throughput.py --out runs/bench.json

bench-check: $(READY)  ## fails if a ratio is 15 % below the one in benchmarks/baseline.json
	@mkdir -p runs
	$(BIN)/python benchmarks/throughput.py --out runs/bench.json --page /dev/null
	$(BIN)/python benchmarks/throughput.py --check runs/bench.json

bench-gpu: $(READY)  ## a model of 1.2 billion parameters on one GPU, ten minutes
	$(BIN)/python benchmarks/one_gpu.py

check: $(READY)  ## format, lint, types, layers; then comments per 100 lines of code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python tools/comment_density.py

docs: $(READY)  ## the documentation site, in site/
	@$(BIN)/python -c 'import mkdocs' 2>/dev/null || $(PIP) -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

schema: $(READY)  ## after a change of the config's schema
	$(BIN)/myllm-ray schema > configs/schema.json

models-supported: $(READY)  ## after an upgrade of transformers: the table of models that keep packed documents apart
	$(BIN)/python tests/models_table.py

features: $(READY)  ## the tables "what works with what" in docs/models.md
	$(BIN)/python -m pytest tests/contracts/test_features.py -m '' --update-golden

golden: $(READY)  ## after a change that is meant to change losses: writes tests/golden/golden.json; the commit says why
	$(BIN)/python -m pytest tests/golden -m '' --update-golden

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
