# Every command that a person or CI types.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
# What needs root is typed with sudo; what is made in the checkout stays with whom it belongs to.
OWNER := $(filter-out UNKNOWN $(shell id -un),$(shell stat -c %U Makefile))
AS_OWNER := $(if $(and $(OWNER),$(filter 0,$(shell id -u))),runuser -u $(OWNER) -- env HOME=$(shell getent passwd $(OWNER) | cut -d: -f6))
SET_UP = $(AS_OWNER) $(PYTHON) scripts/setup_venv.py
CHECK = $(AS_OWNER) $(VENV_PYTHON) -m ruff check --quiet . && $(AS_OWNER) $(VENV_PYTHON) -m ruff format --check --quiet . && $(AS_OWNER) $(VENV_PYTHON) -m mypy --no-error-summary
# Where Python is told to keep nothing that it compiled, as in many containers, each of the hundreds that tests start would do it again.
COMPILE = $(AS_OWNER) $(VENV_PYTHON) -m compileall -q -j 0 service scripts
ifneq ($(AS_OWNER),)
export PYTHONDONTWRITEBYTECODE := 1
GIVE_BACK = ; code=$$?; chown -R $(OWNER): .cache .pytest_cache 2>/dev/null; exit $$code
endif
TESTS ?= tests/image tests/bake tests/local_cloud tests/service tests/nix tests/unit
# Servers that boot wait more than they work, so three files run beside each other; each worker takes the next one in this order,
# the long ones first, or one worker would end alone.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder
# Programs that scripts/setup_host.py unpacked; what is installed comes first.
export PATH := $(PATH):$(CURDIR)/.cache/debian/usr/bin
TEST_REQUIREMENTS := service/requirements.txt service/starter/requirements.txt scripts/requirements.txt \
  tests/requirements.txt

# HOST=, PORT= and MODEL= are for people; the service reads LLM_* from its environment. What is typed behind make wins.
define take
ifeq ($$(origin $(1)),command line)
LLM_$(1) := $$($(1))
endif
LLM_$(1) ?= $$($(1))
ifeq ($$(LLM_$(1)),)
unexport LLM_$(1)
else
export LLM_$(1)
endif
endef
$(foreach name,HOST PORT MODEL,$(eval $(call take,$(name))))

.PHONY: help serve demo bake handover-key cloud cloud-clean test unit test-faults test-launch-faults bench bench-servers bench-cloud bench-image bench-bake bench-rollout pictures train lint audit lock clean

help:
	@echo "make serve   serve a model on 127.0.0.1:8080 (HOST= PORT= MODEL= change that)"
	@echo "make demo    all of it on this machine, for nothing: cloud, bake, launch, rollout (root; KEEP=1 keeps it up, YES=1 asks nothing)"
	@echo "make bake    bake the image, prove it, make it what Terraform launches (BAKE= adds options)"
	@echo "make handover-key  make, once, what a deployment's nodes know each other by"
	@echo "make cloud   a Hetzner Cloud on this machine, for nothing (root; CLOUD= adds options);  make cloud-clean  remove it"
	@echo "make test    run every test;  make unit  only the fast ones"
	@echo "make test-faults  the whole fault plan of a bake, an hour or two (root; FAULTS= adds options)"
	@echo "make test-launch-faults  the whole fault plan of an apply, a quarter of an hour (root, Terraform; FAULTS= adds options)"
	@echo "make bench   measure, as ratios in one run;  make bench-cloud, bench-image, bench-bake, bench-rollout  of cloud, node, bake, rollout (root); BENCH=--help tells options"
	@echo "make bench-servers  measure beside llama-server and Ollama, which are built once (Go, a C++ compiler)"
	@echo "make pictures  the README's drawings and screenshots anew (root; PICTURES=drawings those alone)"
	@echo "make train   train the starter model again (up to an hour)"
	@echo "make lint    check style and types;  make audit  known weaknesses of pinned packages"
	@echo "make lock    pin requirements again;  make clean  remove .venv and caches"

serve:
	@$(SET_UP) service/requirements.txt
	@exec $(VENV_PYTHON) -m service serve

bake:
	@$(SET_UP) scripts/requirements.txt
	@exec $(VENV_PYTHON) scripts/bake.py build --promote $(BAKE)

handover-key:
	@$(SET_UP) scripts/requirements.txt
	@exec $(VENV_PYTHON) scripts/handover_key.py

demo:
	@$(PYTHON) scripts/setup_host.py demo
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.demo $(GIVE_BACK)

cloud:
	@$(SET_UP) scripts/requirements.txt
	@exec $(VENV_PYTHON) -m scripts.local_cloud run $(CLOUD)

cloud-clean:
	@$(SET_UP) scripts/requirements.txt
	@exec $(VENV_PYTHON) -m scripts.local_cloud clean $(CLOUD)

test:
	@$(PYTHON) scripts/setup_host.py test
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(COMPILE)
	@$(CHECK) && $(VENV_PYTHON) -m pytest $(SIDE_BY_SIDE) $(TESTS) $(GIVE_BACK)

unit:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(CHECK) && $(VENV_PYTHON) -m pytest tests/unit $(GIVE_BACK)

test-faults:
	@$(PYTHON) scripts/setup_host.py test-faults
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bake.fault_plan $(FAULTS)

test-launch-faults:
	@$(PYTHON) scripts/setup_host.py test-launch-faults
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bake.launch_fault_plan $(FAULTS)

bench:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bench $(BENCH)

bench-servers:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(SET_UP) tests/bench/requirements.txt
	@$(VENV_PYTHON) -m tests.bench.servers $(BENCH)

bench-cloud:
	@$(PYTHON) scripts/setup_host.py bench-cloud
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bench.cloud $(BENCH) $(GIVE_BACK)

bench-image:
	@$(PYTHON) scripts/setup_host.py bench-image
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bench.image $(BENCH) $(GIVE_BACK)

bench-bake:
	@$(PYTHON) scripts/setup_host.py bench-bake
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bench.bake $(BENCH) $(GIVE_BACK)

bench-rollout:
	@$(PYTHON) scripts/setup_host.py bench-rollout
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.bench.rollout $(BENCH) $(GIVE_BACK)

pictures:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m tests.pictures $(PICTURES) $(GIVE_BACK)

train:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(VENV_PYTHON) -m service.starter.train

lint:
	@$(SET_UP) $(TEST_REQUIREMENTS)
	@$(CHECK)

# Exit code 2 where no list of weaknesses could be asked: then nothing was audited.
audit:
	@$(SET_UP) tests/audit/requirements.txt
	@$(VENV_PYTHON) -m tests.audit

# Needs uv; pins every requirement and all it needs, by hash, for every supported Python.
LOCK := uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
  --no-annotate --custom-compile-command "make lock"
lock:
	$(LOCK) service/requirements.in -o service/requirements.txt
	$(LOCK) -c service/requirements.txt service/starter/requirements.in -o service/starter/requirements.txt
	$(LOCK) -c service/requirements.txt scripts/requirements.in -o scripts/requirements.txt
	$(LOCK) -c service/requirements.txt -c service/starter/requirements.txt -c scripts/requirements.txt tests/requirements.in -o tests/requirements.txt
	$(LOCK) -c service/requirements.txt -c service/starter/requirements.txt -c scripts/requirements.txt -c tests/requirements.txt tests/audit/requirements.in -o tests/audit/requirements.txt
	$(LOCK) -c service/requirements.txt -c service/starter/requirements.txt -c scripts/requirements.txt -c tests/requirements.txt -c tests/audit/requirements.txt tests/bench/requirements.in -o tests/bench/requirements.txt
	$(LOCK) tests/bench/llama-server/requirements.in -o tests/bench/llama-server/requirements.txt

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache
