# make run [PORT=8080] [MODEL=folder|file.gguf|hub/id] [DRAFT=...]   serve
# make test, make check, make bench, make lock
PYTHON3 ?= python3
VENV := .venv
PYTHON := $(abspath $(VENV)/bin/python)

# The MLX backend: Metal on macOS, CUDA where an NVIDIA driver answers, the CPU elsewhere.
ifeq ($(shell uname),Darwin)
BACKEND :=
else
CUDA_DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
ifeq ($(CUDA_DRIVER),)
BACKEND := cpu
else
BACKEND := $(shell [ $(CUDA_DRIVER) -ge 580 ] && echo cuda13 || echo cuda12)
endif
endif
comma := ,
RUN_EXTRAS := $(if $(BACKEND),[$(BACKEND)],)
DEV_EXTRAS := $(if $(BACKEND),[$(BACKEND)$(comma)dev],[dev])

ifdef PORT
export TANDEM_PORT := $(PORT)
endif
ifdef MODEL
export TANDEM_MODEL := $(MODEL)
endif
ifdef DRAFT
export TANDEM_DRAFT_MODEL := $(DRAFT)
endif

.PHONY: run environment test test-drafters test-policy test-convert faults soak fuzz fuzz-api check format bench lock clean
run: $(VENV)/.run-$(BACKEND)
	@exec $(PYTHON) -m tandem serve

$(PYTHON):
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip

$(VENV)/.run-$(BACKEND): pyproject.toml constraints.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".$(RUN_EXTRAS)"
	@touch $@

$(VENV)/.dev-$(BACKEND): pyproject.toml constraints.txt | $(PYTHON)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e ".$(DEV_EXTRAS)"
	@touch $@ $(VENV)/.run-$(BACKEND)

# All that developing takes, in .venv.
environment: $(VENV)/.dev-$(BACKEND)

# Side by side in WORKERS processes, whole files each; a test that fails names the worker it ran in.
WORKERS ?= 2
test: $(VENV)/.dev-$(BACKEND)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile --durations 20

# The reference drafters (DRAFTERS_FOLDER) against their expected acceptance, in a process of its own (its BLAS is loaded before MLX).
test-drafters: $(VENV)/.dev-$(BACKEND)
	DRAFTERS_DOCUMENTS=20 $(PYTHON) -m pytest tests/workers/drafters/test_real_drafters.py \
		tests/workers/drafters/test_training_evaluation.py
	DRAFTERS_DOCUMENTS=20 $(PYTHON) -m pytest tests/system/test_real_drafters.py

# The speculation policy in its clock model at every batch size.
test-policy: $(VENV)/.dev-$(BACKEND)
	POLICY_LONG=1 $(PYTHON) -m pytest tests/scheduler/test_policy_simulation.py

# Every form of conversion against mlx-lm; `make test` takes one of each kind.
test-convert: $(VENV)/.dev-$(BACKEND)
	CONVERT_LONG=1 $(PYTHON) -m pytest tests/tandem/test_convert.py

# Every injected fault, each stop and each change of the model, through real processes: some minutes.
faults: $(VENV)/.dev-$(BACKEND)
	FAULTS_LONG=1 $(PYTHON) -m pytest tests/faults $(addprefix tests/system/test_,$(addsuffix .py,adapters drain memory model_change sockets))

# 200 random kills under 16 streams, then MINUTES of mixed traffic; figures in bench/results.
MINUTES ?= 60
soak: faults
	$(PYTHON) -m tests.faults.soak --kills 200 --out bench/results/faults-kills.json
	$(PYTHON) -m tests.faults.soak --minutes $(MINUTES) --out bench/results/soak.json

# A million messages on the sockets, 20,000 HTTP bodies, 2,000 headers of model files.
fuzz: $(VENV)/.dev-$(BACKEND)
	FUZZ_LONG=1 $(PYTHON) -m pytest --timeout 7200 tests/fuzz

# 5,000 requests generated from /openapi.json: none may end in a 500.
fuzz-api: $(VENV)/.dev-$(BACKEND)
	FUZZ_API_CASES=5450 $(PYTHON) -m pytest -s tests/frontend/test_fuzz_api.py

check: $(VENV)/.dev-$(BACKEND)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev-$(BACKEND)
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: $(VENV)/.dev-$(BACKEND)
	$(PYTHON) -m bench.ceiling
	$(PYTHON) -m bench.serve --concurrency 8

lock: $(VENV)/.dev-$(BACKEND)
	$(PYTHON) -m pip freeze --exclude-editable --exclude torch --exclude mlx-tandem > constraints.txt

clean:
	rm -rf $(VENV) build *.egg-info
