# What CONTRIBUTING.md tells, as commands. Everything lives in .venv; `make setup` is implied.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup test test-isas quick lint bench reference clients litellm open-webui conformance arm64 clean

setup: .venv/ready

# llama-cpp-python compiles from source here: about 5 minutes on two cores, needs a C++ compiler and cmake.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch .venv/ready

# A process for every core, each of which keeps to one (tests/support/cores.py); files are handed out whole, for their
# fixtures, the longest first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST)

# What depends on the instruction set, once more with older ones than this machine's best, as on other people's.
ISA_TESTS := tests/kernels tests/decoder/test_amx_prefill.py tests/decoder/test_kernel_products.py tests/loading/test_startup.py tests/vision/test_int8.py
test-isas: setup
	@for isa in $$($(BIN)/python -m tests.older_isas avx512vnni avx2); do \
		echo "EDGE_RUNTIME_ISA=$$isa"; \
		EDGE_RUNTIME_ISA=$$isa $(PYTEST) $(ISA_TESTS) || exit 1; \
	done

quick: setup
	$(PYTEST) -m "not slow"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Peers that are not installed (extra [bench]) are left out. Random files of the real sizes come into build/bench, 7 GB.
bench: setup
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/vision.py --json build/bench/results/vision.json
	$(BIN)/python benchmarks/report.py build/bench/results/vision.json

# What tests/converters/test_reference_tools.py compares with: llama.cpp's conversion scripts from llama-cpp-python's
# source distribution, its quantizer and its importance matrices compiled against the installed library (seconds, and
# the same code), and an environment of their own with torch; 1.5 GB and about two minutes.
REFERENCE := build/reference
LLAMA := $(shell sed -n 's/.*"\(llama-cpp-python==[^"]*\)".*/\1/p' pyproject.toml)
TOOLS := $(REFERENCE)/llama.cpp
reference: $(REFERENCE)/ready

$(REFERENCE)/ready: .venv/ready
	rm -rf $(REFERENCE) && mkdir -p $(REFERENCE)/bin
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(REFERENCE) "$(LLAMA)"
	tar -xzf $(REFERENCE)/llama_cpp_python-*.tar.gz -C $(REFERENCE)
	mv $(REFERENCE)/llama_cpp_python-*/vendor/llama.cpp $(TOOLS)
	lib=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('platlib'))")/lib; \
	for tool in quantize imatrix; do \
		$(CXX) -O2 -std=c++17 -I$(TOOLS)/common -I$(TOOLS)/include -I$(TOOLS)/ggml/include \
			$(TOOLS)/tools/$$tool/*.cpp -o $(REFERENCE)/bin/llama-$$tool -L$$lib -lllama-common -lllama -lggml -lggml-base \
			-lpthread -Wl,-rpath,$$lib -Wl,--disable-new-dtags || exit 1; \
	done
	$(PYTHON) -m venv $(REFERENCE)/venv
	$(REFERENCE)/venv/bin/pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 bitsandbytes==0.50.2 \
		sentencepiece safetensors
	touch $@

# Vercel's AI SDK, which tests/server/test_client_libraries.py tries where Node.js is at hand, and axe, with which
# tests/server/test_page_access.py looks at the page; seconds.
clients: tests/server/ai_sdk/node_modules/ready tests/server/axe/node_modules/ready
tests/server/%/node_modules/ready: tests/server/%/package-lock.json
	cd $(dir $<) && npm ci --silent --no-audit --no-fund
	touch $@

# LiteLLM's proxy, which tests/server/test_litellm_proxy.py runs in front of two servers: an environment of its own
# (750 MB, a minute), as it pins what others choose.
litellm: build/litellm/ready
build/litellm/ready:
	$(PYTHON) -m venv build/litellm
	build/litellm/bin/pip install --quiet "litellm[proxy]==1.106.12"
	touch $@

# Open WebUI beside the demo in Chromium; its package is 3 GB, so this is no part of the tests.
open-webui: setup build/open-webui/ready
	$(BIN)/python tools/open_webui.py --open-webui build/open-webui/bin/open-webui --pictures build/open-webui/seen

build/open-webui/ready:
	$(PYTHON) -m venv build/open-webui
	build/open-webui/bin/pip install --quiet open-webui==0.12.4
	touch $@

# The yardstick lies beside the checkout where it is at hand.
conformance: setup
	$(BIN)/python ../shared/conformance/check.py tests/conformance_adapter.py ../shared/reference/fixtures --path exact
	$(BIN)/python ../shared/conformance/check.py tests/conformance_adapter.py ../shared/reference/fixtures --path quant

# The tests on emulated 64-bit ARM: NEON, dotprod, i8mm. Needs Debian and root; hours. CONTRIBUTING.md has parts of it.
arm64: setup
	$(BIN)/python tools/arm64.py check

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
