# Everything runs in .venv, which `make setup` builds and every other target brings up to date first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two workers on two cores: one thread each. A file's tests stay together, because they share what they build.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

.DELETE_ON_ERROR:
.PHONY: setup demo demo-text test test-all bench bench-checkpoint bench-merge bench-failures bench-continuing bench-loss bench-throughput bench-preparation lint clean

setup: $(STAMP)  ## .venv with onward and everything to work on it

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "onward needs Python 3.11 or newer: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[demo,dev]"
	touch $@

demo: setup  ## train, kill, continue and compare, on images of digits
	$(BIN)/python examples/digits/demo.py

demo-text: setup  ## the same with SmolLM2 on docstrings
	$(BIN)/python examples/docstrings/demo.py

test: lint  ## lint, then the tests without the whole sweeps
	$(PYTEST) -m "not whole"

test-all: lint  ## lint, then every test: the whole sweeps take their time
	$(PYTEST) -m ""

bench: setup  ## onward beside a bare PyTorch loop and the Hugging Face Trainer
	$(BIN)/python bench/loop.py

bench-checkpoint: setup  ## saving and loading beside torch.save, DCP and the disk's own limit
	$(BIN)/python bench/checkpoint.py

bench-merge: setup  ## merging a LoRA of rank 64 into 1.5 billion parameters, beside PEFT and a plain copy; 13 GB of disk
	$(BIN)/python bench/merge.py

bench-throughput: setup  ## packing, length-sorting and neither, beside Trainer and TRL's SFTTrainer, on real lengths
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python bench/throughput.py

bench-preparation: setup  ## rows a second and memory while a million rows are looked at for the first time
	$(BIN)/python bench/preparation.py

bench-failures: setup  ## runs broken on purpose, Trainer's and onward's; writes docs/failures.md
	$(BIN)/python bench/failures.py

bench-continuing: setup  ## what continuing costs at step 10 and at step 100,000
	$(BIN)/python bench/continuing.py

bench-loss: setup  ## peak memory of the loss over a large vocabulary, whole logits beside chunks
	$(BIN)/python bench/loss.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## everything that can be built again; runs/ and demo/ are yours and stay
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
