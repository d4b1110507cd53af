# The commands that newcomers and CI run. Each target installs what it needs into .venv.
PYTHON ?= python3
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BENCH  := PYTHONPATH=.:tests $(BIN)/python -m bench

# Everything but torch is installed as requirements/*.txt pin it, by hash. The wheels of torch differ by index.
# Without an NVIDIA driver, a CPU build is installed: on Linux, pip would choose the CUDA build, which is
# gigabytes in size. To override this, run e.g. `make test TORCH_INDEX=`.
TORCH_SPEC  ?= torch==2.13.0
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu --timeout 5 --retries 0
endif
LOCKED := $(PIP) --no-deps --require-hashes --requirement

# Each file runs in one process, in the order of tests/conftest.py: slow files first.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
SOAK   := TG_TINKER_SOAK=1 $(BIN)/python -m pytest --timeout 3600

# Other people's clients, from the version that the tests passed with to the next major one.
CLIENTS    := 'lm_eval[api]>=0.4.13,<0.5' 'litellm>=1.110,<2' 'langchain-openai>=1.7,<2' \
              'inspect-ai>=0.3.285,<0.4' 'openai>=3.57,<4'
CLIENT_PIP := $(BIN)/python -m pip --python .venv/clients/bin/python install --quiet --disable-pip-version-check

# pip asks the index that this machine's settings name; uv asks the one in UV_DEFAULT_INDEX.
TOOLS := .venv/tools/bin
LOCK  := $(TOOLS)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
         --no-emit-package torch --custom-compile-command "make lock"
AUDIT ?= --vulnerability-service osv

.PHONY: help lock audit sbom demo check test programs lint soak soak-artifacts soak-kills soak-random soak-cluster soak-families soak-epsilon soak-examples browser clients bench bench-peers clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: .venv/demo ## privately fine-tune SmolLM2-135M on docstrings, sample, save, resume (6 minutes)
	$(BIN)/tg-tinker demo $(ARGS)

check: lint      ## lint, and run the tests that need no cluster and no real model (5 minutes)
	$(BIN)/python -m pytest $(SPREAD) -m 'not slow' $(ARGS)

test: .venv/dev  ## run the tests, the real model included (12 minutes on two cores; ARGS=tests/engine runs one room)
	$(BIN)/python -m pytest $(SPREAD) -m 'not program' --ignore tests/clients $(ARGS)

programs: .venv/dev ## run the tests that start programs, clusters and machines of their own (9 minutes)
	$(BIN)/python -m pytest $(SPREAD) -m program $(ARGS)

lint: .venv/dev  ## run ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: soak-artifacts soak-kills soak-cluster soak-random soak-families soak-epsilon soak-examples ## test faults for longer: the seven parts below (105 minutes)

soak-artifacts: .venv/dev ## test saves, deletions and sweeps in any order; edits of sealed files
	$(SOAK) tests/artifacts/test_artifact_machine.py tests/artifacts/test_artifact_edits.py tests/registry/test_draws.py $(ARGS)

soak-kills: .venv/dev ## test kill -9 at every point, and lost messages of every kind
	$(SOAK) tests/system/test_kill_points.py tests/system/test_lost_messages.py $(ARGS)

soak-cluster: .venv/dev .venv/sshd ## test ray up and ray down with two machines under TLS
	$(SOAK) tests/system/test_ray_up.py $(ARGS)

soak-random: .venv/dev ## test half an hour of random operations, kills and cancels
	$(SOAK) tests/system/test_soak.py $(ARGS)

soak-families: .venv/dev ## test 123 families of models against transformers and PEFT (10 minutes)
	$(SOAK) tests/engine/test_families.py tests/privacy/test_private_families.py $(ARGS)

soak-epsilon: .venv/dev ## test epsilon of 60 settings down to a delta of 1e-15 against the true delta (1 minute)
	$(SOAK) tests/privacy/test_accountants.py $(ARGS)

soak-examples: .venv/dev ## test properties with random examples that are new each time (5 minutes)
	$(SOAK) -m 'not slow' $$(grep -rl '^from hypothesis' tests --include='test_*.py') $(ARGS)

browser: .venv/dev .venv/browser ## test what web pages in a headless browser can do to a server on this machine (1 minute)
	$(BIN)/python -m pytest tests/system/test_browser.py -rs $(ARGS)

clients: .venv/dev .venv/clients/installed ## test `tg-tinker serve` with lm-eval, litellm, langchain, inspect and openai (9 minutes; ARGS='-k litellm')
	.venv/clients/bin/python -m pytest -W ignore -rs --durations 0 --durations-min 0.1 tests/clients $(ARGS)

bench: .venv/dev ## measure speed against the plain padded PEFT loop, goals, cost by size (14 minutes; ARGS=--help)
	$(BENCH) $(ARGS)

bench-peers: .venv/dev ## measure steps through the SDK against SkyRL, installed into .venv-peers (2 GB)
	$(BENCH) --only peers $(ARGS)

lock: .venv/tools/installed ## write requirements/*.txt anew from pyproject.toml (ARGS=--upgrade takes newer versions)
	$(LOCK) $(ARGS) --output-file requirements/dev.txt --extra demo --extra dev pyproject.toml requirements/installation.in
	$(LOCK) --constraints requirements/dev.txt --output-file requirements/demo.txt --extra demo pyproject.toml requirements/installation.in
	$(LOCK) $(ARGS) --output-file requirements/tools.txt requirements/tools.in

audit: .venv/tools/installed ## look for known vulnerabilities of what is locked; skip if the service is out of reach
	@PATH=$(TOOLS):$$PATH .ci/audit $(AUDIT) requirements/dev.txt requirements/tools.txt

sbom: .venv/tools/installed ## write sbom.json, a list (CycloneDX) of what is locked, and of torch
	{ cat requirements/dev.txt; echo "$(TORCH_SPEC)"; } | $(TOOLS)/cyclonedx-py requirements --pyproject pyproject.toml \
	  --index-url '' --output-reproducible --output-format JSON --output-file sbom.json -

clean:           ## remove .venv, caches and outputs
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache *.egg-info sbom.json demo-output audit-output canary-output bench-output

.venv/made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

# torch comes last, when all that its CPU build needs is there: pip then asks its index for nothing else.
.venv/demo: .venv/made pyproject.toml requirements/demo.txt
	@echo "installing what TG-Tinker needs, and $(TORCH_SPEC) (a few minutes the first time)"
	$(LOCKED) requirements/demo.txt
	$(PIP) $(TORCH_INDEX) "$(TORCH_SPEC)"
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/demo .venv/debian requirements/dev.txt
	$(LOCKED) requirements/dev.txt
	@touch $@

.venv/tools/installed: .venv/made requirements/tools.txt
	$(BIN)/python -m venv .venv/tools
	$(TOOLS)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement requirements/tools.txt
	@touch $@

# Installs PostgreSQL and pgbouncer for the registry's tests, without a server that starts by itself.
.venv/debian: .venv/made
	@command -v postgres >/dev/null || ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && mkdir -p /etc/postgresql-common && \
	  echo 'create_main_cluster = false' > /etc/postgresql-common/createcluster.conf && \
	  apt-get install -qq -y --no-install-recommends postgresql >/dev/null 2>&1; } || \
	echo "no PostgreSQL here, its tests skip: install your system's package"
	@command -v pgbouncer >/dev/null || test -x /usr/sbin/pgbouncer || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && mkdir -p /etc/systemd/system && \
	  { test -e /etc/default/pgbouncer || echo 'START=0' > /etc/default/pgbouncer; } && \
	  ln -sf /dev/null /etc/systemd/system/pgbouncer.service && \
	  apt-get install -qq -y --no-install-recommends -o Dpkg::Options::=--force-confold pgbouncer >/dev/null 2>&1; } || \
	echo "no pgbouncer here, its tests skip: install your system's package"
	@touch $@

# Installs sshd for the test of `ray up`, without a service that starts by itself.
.venv/sshd: .venv/made
	@{ test -x /usr/sbin/sshd && command -v rsync && command -v ip; } >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { test -x /usr/sbin/sshd || install -D /dev/null /etc/ssh/sshd_not_to_be_run; } && \
	  apt-get install -qq -y --no-install-recommends openssh-server rsync iproute2 >/dev/null 2>&1; } || \
	echo "no sshd, rsync or ip here, the test of ray up skips: install your system's packages"
	@touch $@

# Installs a browser without a window.
.venv/browser: .venv/made
	@command -v chromium-headless-shell chromium google-chrome chrome-headless-shell >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get install -qq -y --no-install-recommends chromium-headless-shell >/dev/null 2>&1; } || \
	echo "no browser here, its tests skip: install Chromium"
	@touch $@

# Installs other people's clients in front of the packages of .venv, which stay as they are. If one of them
# cannot be installed, the others are, its tests skip, and the next call tries again.
.venv/clients/installed: .venv/dev
	$(BIN)/python -m venv --clear --without-pip .venv/clients
	@for site in .venv/clients/lib/python*/site-packages; do \
	  echo "../../../..$${site#.venv/clients}" > $$site/behind.pth; done
	@echo "installing $(CLIENTS)"
	@$(CLIENT_PIP) $(CLIENTS) && touch $@ || for client in $(CLIENTS); do \
	  $(CLIENT_PIP) "$$client" || echo "$$client cannot be installed"; done
