# `make help` lists the targets. `make check` is all of CI.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Debian packages that only checks need, and the programs that are looked for; a machine that has none of them still
# builds, tests and benches.
DEBIAN_PACKAGES := chromium chromium-driver prometheus redis-server spin
TOOLS := chromium chromedriver prometheus promtool redis-server spin

# The tests, the benches and the demo run on this tree, with the extension built in place. The extension is a target
# of its own, named for the Python it is for, so it is never staler than its sources and never another Python's.
SUFFIX := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
INCLUDE := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')
EXTENSION := shmpool/_core$(SUFFIX)
CORE := shmpool/core $(wildcard shmpool/core/*.[ch])
ENV := $(VENV)/.made$(SUFFIX)
HAS := $(VENV)/.has-

.PHONY: help demo test check servers sanitize bench bench-reference bench-smoke build extension tools lint types clean \
	verify-model verify-interleavings verify-crash verify-sanitize verify-mutants verify-storm verify-hostile
.DELETE_ON_ERROR:
.SECONDARY:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r t d; do printf '%-20s %s\n' "$$t" "$$d"; done

demo: $(HAS)demo $(EXTENSION) ## show the pool at work, against a Redis of its own
	$(BIN)/python -m shmpool demo

test: $(HAS)test $(EXTENSION) ## run all tests but the long recipes and the sanitizer builds
	$(BIN)/python -m pytest -q -n auto -m 'not sanitize and not servers'

check: export SHMPOOL_TEST_TOOLS := required
check: tools lint types build test servers sanitize bench-smoke ## all of CI (installs missing Debian packages, as make tools does)

servers: $(HAS)test $(EXTENSION) ## recipes for real servers, long scenarios, mutants of the core
	$(BIN)/python -m pytest -q -n auto -m servers

sanitize: $(HAS)test $(EXTENSION) ## run the C core's tests under the sanitizers
	$(BIN)/python -m pytest -q -n auto -m sanitize

# The long forms of what the checks do; docs/verification.md says what each proves. SECONDS: for each scenario or storm; a day takes twice that.

SECONDS ?= 60
LONG := SHMPOOL_TEST_LONG=1 SHMPOOL_TEST_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q -n auto --timeout 0
DEBUG_PYTHON ?= python3-dbg

verify-model verify-interleavings verify-crash verify-storm verify-hostile: export SHMPOOL_TEST_TOOLS := required

verify-model: $(HAS)test $(EXTENSION) ## search the model of the protocols with spin, at length
	$(LONG) tests/test_model.py

verify-interleavings: $(HAS)test $(EXTENSION) ## every order of steps of the core, in plain and weak memory, SECONDS a scenario (60)
	SHMPOOL_INTERLEAVE_SECONDS=$(SECONDS) $(BIN)/python -m pytest -q -n auto tests/test_core.py -k 'order_of_steps or weaker_order'

verify-crash: $(HAS)test $(EXTENSION) ## ended, stopped, killed at every step, instruction, system call; recoveries too
	$(LONG) tests/test_core.py tests/test_system_calls.py -k '(crash or killed or system_calls) and not mutant'

verify-sanitize: sanitize ## the sanitizers; and make test on a debug build of Python and of the core (python3-dbg)
	@command -v $(DEBUG_PYTHON) > /dev/null || { echo "$(DEBUG_PYTHON) is missing: Debian has it as python3-dbg," \
	"with python3-venv and libpython3-dev; or give DEBUG_PYTHON=" >&2; exit 1; }
	$(MAKE) test PYTHON=$(DEBUG_PYTHON) VENV=.venv-debug

verify-mutants: $(HAS)test $(EXTENSION) ## every fault that is kept for the core, each of which must be found
	$(BIN)/python -m pytest -q -n auto tests/test_core.py -k mutant

verify-storm: $(HAS)test $(EXTENSION) ## storms of SECONDS (60) each, days, outages, stories against a model
	$(LONG) tests/test_storm.py tests/test_day.py tests/test_outage.py tests/test_reference.py tests/test_join.py \
	  tests/test_join_matrix.py tests/test_stop.py tests/test_recovery.py tests/test_serving.py tests/test_maintenance.py

verify-hostile: $(HAS)test $(EXTENSION) ## 5 000 damaged slabs under sanitizers, 500 killed inspectors, strange surroundings
	$(LONG) tests/test_hostile.py tests/test_surroundings.py tests/test_failures.py

bench: $(HAS)bench $(EXTENSION) ## measure, beside other pools
	$(BIN)/python -m benches

bench-reference: bench ## measure, and make the result the one that benches/README.md shows
	$(BIN)/python -m benches --install benches/results/latest.json

bench-smoke: $(HAS)bench $(EXTENSION) ## see that the benches run
	$(BIN)/python -m benches --quick

build: $(HAS)dev ## make sdist and wheel in dist/, and see that the wheel can be imported
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m pip install -q --no-deps --target build/wheel dist/*.whl
	cd build/wheel && ../../$(BIN)/python -c 'import shmpool; print(shmpool.__version__, shmpool.__file__)'

extension: $(EXTENSION) ## build the extension in place

tools: ## install the Debian packages that only checks need, if one is missing
	@for tool in $(TOOLS); do command -v $$tool > /dev/null || missing="$$missing $$tool"; done; \
	[ -z "$$missing" ] || { echo "missing:$$missing"; \
	if [ "$$(id -u)" = 0 ]; then sudo=; else sudo=sudo; fi; \
	$$sudo apt-get update -q && $$sudo apt-get install -q -y --no-install-recommends $(DEBIAN_PACKAGES); }

lint: $(HAS)dev ## ruff, and the C compiler's warnings as errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CC) -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -fsyntax-only -I$(INCLUDE) $(filter %.c,$(CORE))

types: $(HAS)dev ## mypy strict and pyright
	$(BIN)/mypy --strict shmpool tests/typing
	$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## remove what was built, and the environment
	rm -rf $(VENV) .venv-debug build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache shmpool/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. One stamp for it, one for each set of extras in it; another Python makes it anew.

$(ENV):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check 'setuptools>=77'
	touch $@

$(HAS)%: pyproject.toml setup.py $(ENV) | $(EXTENSION)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[$*]'
	touch $@

$(EXTENSION): setup.py $(CORE) | $(ENV)
	$(BIN)/python setup.py -q build_ext --inplace --force
	touch $@
