# Every target first installs what the machine lacks (deploy/bootstrap.sh) and may be the first command in a checkout.
PYTHON := .venv/bin/python
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
ARGS :=
ROWS :=
# Most tests wait more than they compute: three workers for two cores. Some tests alone run in one process.
PARALLEL := $(if $(ARGS),,-n 3 --dist loadfile --no-loadscope-reorder)
SECONDS := 30
CUTS := 20

.PHONY: demo test fuzz power check lint types imports shape format bench clean installed

demo:  ## build, serve, run and take down a redis container; leaves nothing behind
	@sh deploy/bootstrap.sh demo
	@$(SUDO) $(PYTHON) examples/demo.py

test: installed  ## all tests; ARGS="tests/task -k exec" for some
	@$(SUDO) $(PYTHON) -m pytest $(PARALLEL) $(ARGS)

fuzz: installed  ## every parser; SECONDS=300 for longer, ARGS="tar_reader filters" for some, ARGS=TARGET=FILE for one input
	@$(SUDO) env PYTHONPATH=tests $(PYTHON) -m fuzz --seconds $(SECONDS) $(ARGS)

power: installed  ## cut the power of a loaded node's disk and look what is left; takes qemu-system-common. CUTS=100 ARGS=--keep
	@$(SUDO) unshare --mount env PYTHONPATH=tests:tests/client $(PYTHON) -m power --seconds $(SECONDS) --cuts $(CUTS) $(ARGS)

check: lint types imports shape  ## with -k each part has its say, whatever the others found

lint: installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: installed
	.venv/bin/mypy --strict shared client services
	MYPYPATH=examples .venv/bin/mypy --strict examples

imports: installed
	.venv/bin/lint-imports

shape: installed
	$(PYTHON) -m pytest -q tests/test_shape.py

format: installed  ## rewrite the sources in the house's format
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix-only --quiet .

bench:  ## side by side with containerd; ROWS="pull unpack" for some
	@sh deploy/bootstrap.sh bench
	@$(SUDO) $(PYTHON) -m bench $(ROWS)

installed:
	@sh deploy/bootstrap.sh test

clean:  ## everything that these targets made in the checkout
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .tools .venv uv.lock dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
