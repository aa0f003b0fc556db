# make demo and make test each do all of their own set-up. PYTHON and VENV can be given: make demo PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DEMO_PHOTO = edgesam_deploy/assets/photos/verify/kingfisher.jpg
# On a Jetson the environment must see JetPack's own tensorrt.
SITE = $(if $(wildcard /etc/nv_tegra_release),--system-site-packages)
# Processes that run tests, each file in one of them.
JOBS ?= 2
# The runtime is also tested on the oldest supported Python (JetPack 6), where one is at hand.
PYTHON310 ?= $(shell for p in $$HOME/.pyenv/versions/3.10.*/bin/python3.10 python3.10; do $$p -c "" 2>/dev/null && echo $$p && break; done)

.PHONY: demo test lint types runtime310 clean

demo: $(BIN)/.export
	$(BIN)/sam-export build --precision int8
	$(BIN)/sam-export verify engines/cpu/reference-int8
	$(BIN)/sam-export bench engines/cpu/reference-int8
	$(BIN)/sam-export predict $(DEMO_PHOTO) --bundle engines/cpu/reference-int8 --point 290,180 -o demo/overlay.png

test: $(BIN)/.dev lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile
	$(MAKE) --no-print-directory runtime310

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(BIN)/.dev
	$(BIN)/mypy

# A base install on Python 3.10 (no torch, no onnx) runs a bundle and finishes a kit that a newer Python built.
ifeq ($(PYTHON310),)
runtime310:
	@echo "skipped: no Python 3.10 found for the runtime test (give one: make test PYTHON310=...)"
else
runtime310: $(BIN)/.dev $(VENV)-3.10/.ready
	$(BIN)/sam-export build --precision int8 -o $(VENV)-3.10/bundle/reference-int8
	$(BIN)/sam-export build --target rtx --precision int8 -o $(VENV)-3.10/kit/reference-int8
	EDGESAM_TEST_BUNDLE=$(abspath $(VENV)-3.10)/bundle/reference-int8 EDGESAM_TEST_KIT=$(abspath $(VENV)-3.10)/kit/reference-int8 \
		$(VENV)-3.10/bin/python -m pytest tests/runtime
endif

$(VENV)-3.10/.ready: pyproject.toml
	$(PYTHON310) -m venv $(VENV)-3.10
	$(VENV)-3.10/bin/python -m pip install -q -e '.[cpu,openvino,rtx]' pytest
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(SITE) $(VENV)

$(BIN)/.export: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[export]'
	touch $@

$(BIN)/.dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[export,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-3.10 demo dist engines/*/
