# Two commands are enough: `make demo` (the main job, on a real model) and `make test`.
.DEFAULT_GOAL := help
CARGO ?= cargo
PYTHON ?= python3
VENV = PYTHON="$(PYTHON)" bash tests/venv.sh
# How the command, the wheel and the soak are built. With `dev` they share what the tests have built.
PROFILE ?= release
BUILT = $${CARGO_TARGET_DIR:-target}/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
# How long `make soak` goes on.
MINUTES ?= 30
# And `make fuzz`.
SECONDS ?= 60

.PHONY: help demo test test-rust test-rust-all test-rust-doc test-rust-shuttle test-python sanitize sanitize-python crash-test test-integrations test-vllm test-sglang test-remote test-clients test-events sweep soak load fuzz wheel command release-wheel bench bench-daemon bench-disk bench-foyer bench-python bench-peers book package lint semver fmt clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

demo: ## A real model answering repeated prompts, without and with the cache
	$(CARGO) run --release --locked -p kvkeep-cli -- demo

test: ## All tests that need no service. One part that fails keeps no other from running
	@$(MAKE) --no-print-directory --keep-going $(RUST_TESTS) test-python

# Each stands alone.
RUST_TESTS = test-rust-all test-rust-doc test-rust-shuttle

test-rust: ## The Rust tests (nextest where it is installed)
	@$(MAKE) --no-print-directory --keep-going $(RUST_TESTS)

test-rust-all:
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --locked --workspace $${CI:+--profile ci}; \
	else \
		echo "cargo-nextest is not installed: using cargo test"; $(CARGO) test --locked --workspace --lib --bins --tests; \
	fi

test-rust-doc:
	$(CARGO) test --locked --doc --workspace

test-rust-shuttle:
	RUSTFLAGS="--cfg shuttle" $(CARGO) test --locked -p kvkeep --test shuttle --target-dir $${CARGO_TARGET_DIR:-target}/shuttle

crash-test: ## Cut the power at every operation, kill a writing process at random moments (ROUNDS=200), check what is left
	$(CARGO) test --locked --workspace --lib power_cut -- --include-ignored
	KVKEEP_CRASH_ROUNDS=$(or $(ROUNDS),200) $(CARGO) test --locked --workspace --test crash -- --nocapture

test-python: wheel ## The Python tests that need numpy alone, and the wheel in an empty environment
	PYTHON="$(PYTHON)" bash tests/python.sh

test-integrations: wheel ## The slower end-to-end runs: the demos, the benchmarks, the dashboard in Chromium, torch, transformers, notebooks
	CARGO="$(CARGO)" PYTHON="$(PYTHON)" bash tests/integrations.sh "$(BUILT)/kvkeep"
	PYTHON="$(PYTHON)" bash tests/integrations_python.sh

test-vllm: wheel ## kvkeep under vLLM on the CPU: a real engine, and the abstract classes of other releases (fetches 1 GB the first time)
	PYTHON="$(PYTHON)" bash tests/vllm.sh

test-remote: ## Remote tiers on real servers (Redis, a cluster, S3), with faults, and two servers that share a store
	CARGO="$(CARGO)" PYTHON="$(PYTHON)" bash tests/remote.sh

test-sglang: wheel ## kvkeep under SGLang on the CPU: its own HiCache controller over its own pools (fetches 4 GB the first time)
	PYTHON="$(PYTHON)" bash tests/sglang.sh

# What handles raw memory: the arena, its huge pages, and its private views.
# Not the one that reads how the kernel maps the arena: under valgrind it maps another way.
SANITIZED = tier::ram --skip huge_pages_where_the_kernel

sanitize: ## The code that handles raw memory, under valgrind (memcheck)
	@if valgrind --version >/dev/null 2>&1; then \
		$(CARGO) test --locked --workspace --lib --no-run && \
		CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=9" \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="valgrind -q --error-exitcode=9" \
		$(CARGO) test --locked --workspace --lib -- --test-threads 1 $(SANITIZED); \
	else echo "skipped: valgrind is not installed"; fi

# A build of its own, with a switch of rustc's that a stable one has under this name; gcc's runtime goes before Python's libraries.
sanitize-python: ## The Python extension under AddressSanitizer: what lends it memory and borrows its own
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" $(CARGO) build --locked -p kvkeep-python --target $$(uname -m)-unknown-linux-gnu --target-dir target/asan
	$(VENV) .venv-test numpy "pytest>=9,<10" ml_dtypes "mypy>=2,<3"
	rm -rf target/asan/site && mkdir -p target/asan/site && cp -r crates/kvkeep-python/python/. target/asan/site
	cp target/asan/$$(uname -m)-unknown-linux-gnu/debug/lib_kvkeep.so target/asan/site/kvkeep/_kvkeep.abi3.so
	cd crates/kvkeep-python && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0:abort_on_error=1 PYTHONMALLOC=malloc PYTHONPATH=$$PWD/../../target/asan/site \
		$${SANITIZED_PYTHON:-../../.venv-test/bin/python} -m pytest -p no:cacheprovider tests/test_lending.py tests/test_tokens.py tests/test_simple.py tests/test_values.py

test-events: command ## KV events of the server, read with vLLM's own classes and by Dynamo's indexer (after test-vllm; fetches 75 MB the first time)
	PYTHON="$(PYTHON)" bash tests/kv_events.sh $${CARGO_TARGET_DIR:-target}/release/kvkeep

sweep: wheel ## Every causal architecture of the installed transformers: right or refused by name (an hour on two busy cores)
	KVKEEP_SWEEP=all PYTHON="$(PYTHON)" bash tests/integrations_python.sh sweep

soak: ## MINUTES (30) of mixed load at twice the disk cap, watched from outside
	$(CARGO) build --profile $(PROFILE) --locked $(if $(filter dev,$(PROFILE)),--workspace,-p kvkeep) --example soak
	$(PYTHON) tests/soak.py "$(BUILT)/examples/soak" $$(( $(MINUTES) * 60 ))

fuzz: ## SECONDS (60) of anything into the disk format's decoders, and into the codecs; needs cargo-fuzz and a C++ compiler, no nightly
	@if $(CARGO) fuzz --version >/dev/null 2>&1; then \
		mkdir -p fuzz/corpus/format && cd fuzz && RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run format corpus/format \
			../crates/kvkeep/tests/fixtures/disk-v1 ../crates/kvkeep/tests/fixtures/disk-v1-encrypted \
			-- -max_total_time=$(SECONDS) -max_len=16384 -print_final_stats=1 \
		&& mkdir -p corpus/codecs && RUSTC_BOOTSTRAP=1 $(CARGO) fuzz run codecs corpus/codecs \
			-- -max_total_time=$(SECONDS) -max_len=16384 -print_final_stats=1; \
	else echo "skipped: cargo-fuzz is not installed (cargo install cargo-fuzz)"; fi

bench: ## Benchmarks against memcpy and each other; figures go to docs/benchmarks.md
	$(CARGO) bench --locked -p kvkeep --bench cache
	$(CARGO) run --release --locked -p kvkeep-cli -- bench --engine

bench-python: wheel ## The Python front door against a dict and memcpy (needs what test-integrations installs)
	PYTHON="$(PYTHON)" bash tests/integrations_python.sh bench

test-clients: command ## openai, LiteLLM, LangChain, llama-index, llm, the AI SDK and curl against the server, directly and through nginx
	PYTHON="$(PYTHON)" bash tests/clients/run.sh "$(BUILT)/kvkeep"

load: command ## 32 clients at a server for a minute
	$(PYTHON) tests/load.py "$(BUILT)/kvkeep" 60 32

wheel: command ## The Python wheel with the command kvkeep in it, into dist/: one for CPython 3.10 and later
	$(VENV) .venv-build "maturin>=1.16,<2"
	rm -f dist/kvkeep-*.whl
	.venv-build/bin/maturin build --profile $(PROFILE) --locked --manifest-path crates/kvkeep-python/Cargo.toml --out dist

command:
	$(CARGO) build --profile $(PROFILE) --locked $(if $(filter dev,$(PROFILE)),--workspace --tests,-p kvkeep-cli)
	install -D "$(BUILT)/kvkeep" crates/kvkeep-python/kvkeep.data/scripts/kvkeep

release-wheel: ## The wheel for every Linux with glibc 2.28 or later (2018): zig links it, from the package ziglang
	$(VENV) .venv-release "maturin[zig]>=1.16,<2" "cargo-zigbuild>=0.20"
	PATH="$$PWD/.venv-release/bin:$$PATH" cargo-zigbuild zigbuild --release --locked -p kvkeep-cli --features remote --target $$(uname -m)-unknown-linux-gnu.2.28
	install -D $${CARGO_TARGET_DIR:-target}/$$(uname -m)-unknown-linux-gnu/release/kvkeep crates/kvkeep-python/kvkeep.data/scripts/kvkeep
	rm -f dist/kvkeep-*.whl
	.venv-release/bin/maturin build --release --locked --features remote --zig --compatibility manylinux_2_28 --target $$(uname -m)-unknown-linux-gnu \
		--manifest-path crates/kvkeep-python/Cargo.toml --out dist

bench-disk: ## The disk tier against fio in DIR (target)
	$(CARGO) run --release --locked -p kvkeep-cli -- bench --disk $${DIR:-target}

bench-daemon: ## Get and put between two processes through the daemon's memory, beside memcpy in the same run
	bash benches/daemon/run.sh

bench-foyer: ## foyer's disk cache in DIR (target), for comparison; builds it first
	cd benches/foyer && $(CARGO) build --release --locked
	benches/foyer/target/release/kvkeep-bench-foyer $${DIR:-target}

bench-peers: wheel ## kvkeep in turns with llama-server, a dict, redis, LMCache and foyer, in DIR (target); fetches 4 GB and builds llama-server first
	PYTHON="$(PYTHON)" bash benches/peers/run.sh $${DIR:-target}

# mdBook is built into target/tools the first time.
book: ## The guides as one site, in target/book; links are checked
	$(PYTHON) tests/docs.py
	@[ -x target/tools/bin/mdbook ] || $(CARGO) install --quiet --locked --debug mdbook --version 0.5.4 --no-default-features --features search --root target/tools
	target/tools/bin/mdbook build

package: ## The crates as they would be published, each built from its package
	$(CARGO) publish --workspace --dry-run --locked

lint: ## Format, clippy, and dependency rules
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) clippy --locked -p kvkeep --no-default-features -- -D warnings
	$(CARGO) clippy --locked -p kvkeep --no-default-features --features disk -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --workspace --exclude kvkeep-cli --no-deps
	RUSTFLAGS="--cfg shuttle" $(CARGO) clippy --locked -p kvkeep --tests --target-dir $${CARGO_TARGET_DIR:-target}/shuttle -- -D warnings
	@if $(CARGO) deny --version >/dev/null 2>&1; then $(CARGO) deny check bans licenses sources; \
	else echo "skipped: cargo-deny is not installed"; fi

# A git revision to compare with.
BASE ?= HEAD~

semver: ## What the public Rust API has lost or changed since BASE (HEAD~); needs cargo-semver-checks
	@if $(CARGO) semver-checks --version >/dev/null 2>&1; then \
		$(CARGO) semver-checks check-release -p kvkeep -p kvkeep-engine -p kvkeep-server --baseline-rev $(BASE); \
	else echo "skipped: cargo-semver-checks is not installed (cargo install cargo-semver-checks --locked)"; fi

fmt: ## Format everything
	$(CARGO) fmt --all

clean: ## Remove what was built
	$(CARGO) clean
	rm -rf dist .venv-build .venv-clients .venv-dynamo .venv-empty .venv-peers .venv-release .venv-remote .venv-server .venv-test .venv-torch .venv-sglang .venv-sglang-release .venv-vllm .venv-vllm-releases
