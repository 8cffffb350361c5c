# Shorthands for the README's commands.
PYTHON ?= python3

.PHONY: setup segment test test-lowest lint fuzz gpu

setup: .venv/bin/depict

.venv/bin/depict: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install torch==2.14.1 torchvision==0.29.1
	.venv/bin/pip install -e ".[test,train,lora]"
	touch $@

segment: setup
	.venv/bin/depict segment tests/data/street.jpg

test: setup
	.venv/bin/pytest

# The oldest releases that are supported, on the oldest Python that they support.
PYTHON_LOWEST ?= python3.10
LOWEST = torch==2.8.0 torchvision==0.23.0 transformers==5.20.2 datasets==5.1.0 evaluate==0.4.3 accelerate==1.3.0 \
	safetensors==0.8.0 pillow==11.3.0 pyyaml==6.0

.venv-lowest/bin/depict: pyproject.toml
	$(PYTHON_LOWEST) -m venv .venv-lowest
	.venv-lowest/bin/pip install $(LOWEST)
	.venv-lowest/bin/pip install $(LOWEST) -e ".[test]"
	touch $@

# What old releases do has since been deprecated by others, and is no fault of ours.
test-lowest: .venv-lowest/bin/depict
	.venv-lowest/bin/pytest --override-ini=filterwarnings=

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Damaged inputs of every kind, until one breaks the rule; SEED=N makes those of an earlier run again.
MINUTES ?= 10
fuzz: setup
	PYTHONPATH=.:tests .venv/bin/python -m fuzzing --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# What only a GPU can show, then a short benchmark on it; under ten minutes on one card.
gpu: setup
	.venv/bin/pytest -m gpu tests/gpu
	.venv/bin/python -m training.benchmark --device cuda --seconds 10
