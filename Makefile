# `make help` lists the targets. The first install compiles llama-cpp-python (minutes); its wheel is kept outside the
# checkout, so neither `make clean` nor another clone compiles it again.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LLAMA_VERSION := $(shell sed -n 's/^llama-cpp-python==\([0-9.]*\).*/\1/p' requirements.lock)
# What a reranker does not need is left out of the build: mtmd/LLaVA, the tools, and (build/llama-options.cmake)
# llama.cpp's "common" library, which only its tools use. CMAKE_ARGS="-DGGML_CUDA=on" make install: for a GPU.
# PORTABLE=1: for any CPU of this architecture, one library for each of its instruction sets, the best taken at start.
LLAMA_PORTABLE := -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON -DCMAKE_INSTALL_BINDIR=llama_cpp/lib
# gcc tunes for the very CPU with -march=native; on Zen 4 its kernels are then a sixth slower than tuned for any.
LLAMA_NATIVE := $(if $(filter x86_64,$(shell uname -m)),-DCMAKE_C_FLAGS=-mtune=generic -DCMAKE_CXX_FLAGS=-mtune=generic )
LLAMA_OPTIONS := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF $(if $(PORTABLE),$(LLAMA_PORTABLE) ,$(LLAMA_NATIVE))$(CMAKE_ARGS)
# Other builds are for this CPU, so the kept wheel is named by version, options and CPU.
LLAMA_CPU := $(if $(findstring GGML_NATIVE=OFF,$(LLAMA_OPTIONS)),,grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null)
LLAMA_KEY := $(shell (echo '$(LLAMA_OPTIONS)'; uname -sm; $(LLAMA_CPU)) | cksum | cut -d' ' -f1)
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/rerank-server
export PIP_CACHE_DIR ?= $(CACHE)/pip
LLAMA_WHEELS := $(CACHE)/llama-cpp-python-$(LLAMA_VERSION)-$(LLAMA_KEY)

.PHONY: help install run mini convert verify openapi test lint bench quality soak accel clean lock clients cluster cluster-demo image

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed ## make .venv with everything that serving and converting need

run: install ## start the server on port 8000 (ARGS="--port 9000 ..." for its flags)
	@ls models/bge-reranker-*.gguf >/dev/null 2>&1 || [ -n "$$RERANK_M3" ] || $(MAKE) --no-print-directory mini
	@exec $(BIN)/python rerank_server.py $(ARGS)

mini: install ## make models/mini-Q8_0.gguf, the small model that needs no Hub
	@[ models/mini-Q8_0.gguf -nt convert/models.py ] || $(BIN)/python -m convert mini || [ -f models/mini-Q8_0.gguf ]

convert: install ## convert m3 and gemma, or one: MODEL=m3 [QUANT=Q5_K_S]
	@for model in $(or $(MODEL),m3 gemma); do \
		$(BIN)/python -m convert $$model $(if $(QUANT),--quant $(QUANT)) || exit $$?; done

verify: mini ## compare the mini model's quantisations with float32: token ids, logits, ranks, speed
	$(BIN)/python -m convert mini --quant F32 F16 Q8_0 Q5_0 --out build/verify

openapi: install ## write web/openapi.json and web/docs.html from the server's tables
	$(BIN)/python docs/openapi.py

clients: $(VENV)/.installed-clients ## install other projects' rerank clients, which some tests drive when they are there

cluster: $(VENV)/.installed-cluster ## install what cluster/ needs (Ray), which some tests use when it is there

cluster-demo: cluster mini ## start a cluster of three nodes on this machine, ask it, and score a file with it
	$(BIN)/python -m cluster.demo

test: $(VENV)/.installed-dev mini ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev mini ## measure the served model: pairs and tokens per second, latency, memory
	$(BIN)/python -m bench $(ARGS)

quality: $(VENV)/.installed-dev mini ## measure ranking quality on judged data: DATA=DIR [ARGS="FILE.gguf m3 http://..."]
	$(BIN)/python -m bench.quality --data $(or $(DATA),tests/data/quality) $(ARGS)

soak: $(VENV)/.installed-dev ## load and faults for a while: 64 clients (ARGS="--minutes 10")
	$(BIN)/python tests/soak.py $(ARGS)

accel: $(VENV)/.installed ## build the int8 and bf16 engine that the server then uses (x86-64; about a minute)
	@if [ "$$(uname -m)" = x86_64 ]; then $(MAKE) --no-print-directory accel/lib/.built; \
		else echo "The int8 engine is for x86-64 CPUs; here llama.cpp computes by itself, and nothing is built."; fi

# Without docker: buildah in a chroot, which needs no daemon. BASE: another Debian; TARGET=cuda: the image for NVIDIA GPUs.
image: ## build the container image rerank-server:latest with docker, else with buildah (BASE=... TARGET=cuda)
	@container/build $(if $(BASE),--build-arg BASE=$(BASE)) --target $(or $(TARGET),server) $(ARGS)

clean: ## remove .venv and what was built; models and the compiled wheel stay
	rm -rf $(VENV) build accel/lib .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(VENV)/.installed: requirements.lock $(LLAMA_WHEELS)/.done
	@echo "Installing into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --force-reinstall $(LLAMA_WHEELS)/*.whl
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock $(VENV)/.installed
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.installed-clients: requirements-clients.lock $(VENV)/.installed-dev
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-clients.lock
	@touch $@

$(VENV)/.installed-cluster: requirements-cluster.lock $(VENV)/.installed
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes -r requirements-cluster.lock
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed (PYTHON=python3.12 make ...)" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV)

$(LLAMA_WHEELS)/.done: | $(BIN)/python
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "A C++ compiler is needed to compile llama.cpp (Debian: apt install g++)"; exit 1; }
	@echo "Compiling llama-cpp-python $(LLAMA_VERSION) for this machine. This happens once: about 3 minutes on 2 cores."
	@mkdir -p build $(LLAMA_WHEELS)
	@echo 'set(LLAMA_BUILD_COMMON OFF)' > build/llama-options.cmake
	@awk '/^llama-cpp-python==/{p=1} p{print} p&&!/\\$$/{exit}' requirements.lock > build/llama.txt
	@CMAKE_ARGS="$(LLAMA_OPTIONS) -DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/build/llama-options.cmake" \
		$(BIN)/python -m pip wheel -v --disable-pip-version-check --no-deps --no-cache-dir --require-hashes \
		-r build/llama.txt -w $(LLAMA_WHEELS) 2>&1 | tee build/llama.log \
		| grep --line-buffered -oE '\[ *[0-9]+(/[0-9]+|%)\]' | while read -r step; do printf '\r  %s ' "$$step"; done \
		|| { echo "failed; the end of build/llama.log:"; tail -n 20 build/llama.log; exit 1; }
	@echo; touch $@

# ggml's headers come from the source distribution of the very version that is installed, oneDNN from PyPI.
accel/lib/.built: $(wildcard accel/*.cpp accel/*.h) accel/CMakeLists.txt accel/requirements.lock $(VENV)/.installed
	@command -v g++ >/dev/null || { echo "A C++ compiler is needed (Debian: apt install g++)"; exit 1; }
	@echo "Building the engine for llama-cpp-python $(LLAMA_VERSION) ..."
	@rm -rf build/accel && mkdir -p build/accel
	@awk '/^llama-cpp-python==/{p=1} p{print} p&&!/\\$$/{exit}' requirements.lock > build/accel/llama.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r accel/requirements.lock \
		--ignore-installed --prefix build/accel/prefix
	@$(BIN)/python -m pip download -qq --disable-pip-version-check --no-deps --require-hashes --no-binary llama-cpp-python \
		-r build/accel/llama.txt -d build/accel
	@tar -xzf build/accel/llama_cpp_python-*.tar.gz -C build/accel --strip-components=3 --wildcards \
		'*/vendor/llama.cpp/ggml/include/*.h' '*/vendor/llama.cpp/ggml/src/*.h'
	@cmake=$$(echo build/accel/prefix/lib/python*/site-packages/cmake/data/bin/cmake); \
	llama=$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("llama_cpp").submodule_search_locations[0])'); \
	{ $$cmake -S accel -B build/accel/cmake -DGGML=$(CURDIR)/build/accel/ggml -DONEDNN=$(CURDIR)/build/accel/prefix \
		-DLLAMA_LIB=$$llama/lib -DLLAMA_VERSION=$(LLAMA_VERSION) && $$cmake --build build/accel/cmake && \
		$$cmake --install build/accel/cmake --prefix $(CURDIR)/accel/lib; } > build/accel/log 2>&1 \
		|| { echo "failed; the end of build/accel/log:"; tail -n 20 build/accel/log; exit 1; }
	@echo "Built: accel/lib"; touch $@

RESOLVE := uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header --no-annotate

# The locks are made with `uv pip compile`; run this after changing the dependencies in pyproject.toml.
lock: ## resolve the dependencies again into the locks (needs uv)
	$(RESOLVE) --extra convert pyproject.toml -o requirements.lock
	$(RESOLVE) -c requirements.lock --no-emit-package llama-cpp-python pyproject.toml -o requirements-server.lock
	$(RESOLVE) --extra convert --extra bench --extra test --extra clients -c requirements.lock pyproject.toml \
		-o requirements-clients.lock
	$(RESOLVE) --extra convert --extra bench --extra test -c requirements-clients.lock pyproject.toml \
		-o requirements-dev.lock
	$(RESOLVE) accel/requirements.in -o accel/requirements.lock
	$(RESOLVE) --extra cluster -c requirements-clients.lock pyproject.toml -o requirements-cluster.lock
