# Everything runs in a virtual environment of this folder; python3 and make are all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# setuptools warns at length of any editable installation.
pip = PYTHONWARNINGS=ignore $(1)/python -m pip install

.PHONY: demo test check format types docs slow formats gpu-check mini release clean

# The main job on the models that come with wsss: the base install alone, without torch.
demo: build/demo-venv/.installed
	build/demo-venv/bin/wsss demo --out demo

# A file to a process at a time: fixtures that export are made once. Two processes fit the memory of small machines; with
# more than a thread each, OpenMP's threads wait for one another in loops and take three times as long.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# mypy does not follow the folders that pyproject maps into the package, hence a tree of links and a count of files.
types: $(VENV)/.installed
	PYTHON=$(BIN)/python bash .ci/types

# The documentation site, build/site. Needs no network; a warning is an error.
docs: $(VENV)/.installed
	bash .ci/tree
	$(BIN)/python .ci/commands.py
	$(BIN)/python -m wsss.benchmarks.studies.tables
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet

# Full-size models, minutes each on a CPU.
slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

# What `wsss convert` writes, read back by every consumer's own reader, in an environment of its own: two of them want an
# older numpy and Pillow than the rest.
formats: build/formats-venv/.installed
	build/formats-venv/bin/python -m pytest -rs tests/runtime/convert

# On a machine with an NVIDIA GPU: engines, parity and speed into benchmarks/results/gpu-NAME.json; goes on where it was cut.
# Installs nothing and needs no network. ARGS="--full" adds the large models, ARGS="--bundle DIR" takes graphs made elsewhere.
gpu-check:
	bash .ci/tree
	PYTHONPATH=build/tree $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m wsss.benchmarks.gpu_check --out benchmarks/results $(ARGS)

# Trains the models of the bundle `mini` from nothing and exports them; resumes where it was stopped.
mini: $(VENV)/.installed
	$(BIN)/python -m wsss.mini

# The wheel and the source distribution, with their contents checked, in dist/.
release: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/contents.py dist

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(call pip,$(BIN)) --quiet --upgrade pip
	$(call pip,$(BIN)) --quiet --editable '.[dev]'
	touch $@

build/demo-venv/.installed: pyproject.toml
	test -x build/demo-venv/bin/python || $(PYTHON) -m venv build/demo-venv
	$(call pip,build/demo-venv/bin) --quiet --upgrade pip
	$(call pip,build/demo-venv/bin) --quiet --editable '.[cpu]'
	touch $@

build/formats-venv/.installed: pyproject.toml
	test -x build/formats-venv/bin/python || $(PYTHON) -m venv build/formats-venv
	build/formats-venv/bin/python -m pip install --quiet --upgrade pip
	build/formats-venv/bin/python -m pip install --quiet --editable '.[cpu,readers]'
	touch $@

clean:
	rm -rf build dist demo *.egg-info
