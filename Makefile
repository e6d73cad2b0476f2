# Everything runs from a fresh clone: the first target that needs it makes .venv with the pinned dependencies.
PYTHON ?= $(shell for p in python3.13 python3.12 python3; do command -v $$p >/dev/null 2>&1 && \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
SITE := .venv/.site

# Large pages for large arrays: steps of a U-Net take an eighth less time on Linux (glibc 2.35 and later).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo check types test release docs bench clean install
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "sami_ppl needs Python 3.12 or newer; none of python3.13, python3.12, python3 is. \
	Install one and say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@test -x $(BIN)/python && $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { rm -rf .venv; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(SITE): $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/sami run models/disks.py --out runs/disks

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

types: $(INSTALLED)
	$(BIN)/pyright

test: $(SITE)
	$(BIN)/python -m pytest -m "not release" -n 2 --dist loadfile --no-loadscope-reorder

# What a release needs beside: whole runs of every inference and kind of prior, pages of the documentation as they run,
# the wheel, a browser, several processes, controls that break the source.
release: $(SITE)
	$(BIN)/python -m pytest -m release -n 2 --dist loadfile

# The documentation as a site, docs/_build/index.html; its code is run by `make release`, not here.
docs: $(SITE)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# Times of steps against each other and against this machine's own ceilings; BENCH=--quick for two configurations.
bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.steps $(BENCH)

clean:
	rm -rf .venv runs dist build docs/_build
