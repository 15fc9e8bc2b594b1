# `make demo` and `make test` set up their own virtual environment; neither needs anything but Python 3.11 or later.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
LOCAL := .selfcascade
# Files of tests side by side: most of the suite computes on one thread. In their order, so that those of whole commands, which last minutes, come first
# and the last ones are short: sorted by its number of tests, as is usual, a file of two long ones would begin when all others are over.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
UI_PORT ?= 4200
UI_HOME ?= $(CURDIR)/$(LOCAL)/prefect

.PHONY: demo test test-full test-diffusers-0.40 test-ray test-peers ui lint mutants audit bench configs constraints docs clean

demo: $(VENV)/.user
	$(BIN)/selfcascade run --config demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL)

# One after another: they kill, fill and start whole servers, which wait for each other as long as a quiet machine needs.
test-full: $(VENV)/.dev
	$(BIN)/python -m pytest -m full

# The method and the baselines on the lowest diffusers that the packaging allows; `make test` has the highest.
test-diffusers-0.40: $(VENV)-diffusers-0.40/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" $(VENV)-diffusers-0.40/bin/python -m pytest $(PARALLEL) tests/unit/cascade tests/unit/baselines

# Units on a Ray cluster of this machine; Ray is large, and no part of what the tests install.
test-ray: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m 'full or not full' tests/flows/test_clusters.py

# FID, KID, Inception score and the shares of neighbours by us and by torch-fidelity, clean-fid and prdc, on the same pictures and weights.
test-peers: $(VENV)-peers/.dev
	$(VENV)-peers/bin/python -m pytest tests/peers

ui: $(VENV)/.user
	PREFECT_HOME="$(UI_HOME)" PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_UI_API_URL=http://127.0.0.1:$(UI_PORT)/api \
	$(BIN)/prefect server start --host 127.0.0.1 --port $(UI_PORT)

lint: $(VENV)/.dev $(LOCAL)/types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(LOCAL)/types $(BIN)/mypy -p selfcascade -p selfcascade_flows -p selfcascade_tasks
	$(BIN)/lint-imports

# Known defects, planted one at a time: each must fail the test that is named beside it.
mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants.py

# Keys that slipped into the repository, beyond those of tests in the baseline; and known weaknesses of the pinned packages, which needs pypi.org.
audit: $(VENV)-audit/.dev
	git ls-files -z -- ':!docs/results' ':!*.safetensors' ':!*.png' ':!*tokenizer*' ':!infra/secrets.baseline' | xargs -0 $(VENV)-audit/bin/detect-secrets-hook --baseline infra/secrets.baseline
	$(VENV)-audit/bin/pip-audit --disable-pip --no-deps -r constraints.txt

# Measures the shipped base against real renders, and seconds an image and a training step of every method. Takes two hours.
bench: $(VENV)/.dev $(VENV)-peers/.dev
	$(BIN)/python tests/bench/base.py selfcascade/bases/tiny-emoji
	$(BIN)/python tests/bench/sampling.py --sixteen --out bench.json
	$(BIN)/python tests/bench/memory.py --out memory.json
	$(BIN)/python tests/bench/training.py --out training.json
	$(BIN)/python tests/bench/coverage.py --out coverage.json
	$(BIN)/python tests/bench/operations.py --out operations.json
	$(VENV)-peers/bin/python tests/bench/evaluation.py --out evaluation.json

# Rewrites what is derived: comments of the shipped runs, tables of README and pages, list of modules.
configs: $(VENV)/.dev
	$(BIN)/python -m selfcascade_flows.configuration

constraints: $(VENV)/.dev
	sed -n 1p constraints.txt > constraints.new
	$(BIN)/pip freeze --exclude-editable --disable-pip-version-check | sed -E -e '/^#/d' -e '/ @ /d' -e 's/\+[a-z0-9.]+$$//' >> constraints.new
	mv constraints.new constraints.txt

docs: $(VENV)/.dev
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/claims.py
	$(BIN)/python docs/modules.py

clean:
	rm -rf $(VENV) $(VENV)-* $(LOCAL) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache

# The stamps say what is installed; a change of the packaging installs again.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[store,emoji,eval]'
	touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[store,emoji,eval,http,language,heif,dask,peers,lora,tensorboard,observe,dev]'
	touch $@

# Another diffusers in front of everything else that is installed, torch too.
$(VENV)-diffusers-%/.dev: $(VENV)/.dev
	$(BIN)/python -m venv --clear $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check 'diffusers==$*.*'
	touch $@

# Other tools of evaluation and reading, behind them what is installed. They want torchvision, which the main environment must not have.
$(VENV)-peers/.dev: $(VENV)/.dev
	$(BIN)/python -m venv --clear $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch-fidelity==0.4.0 clean-fid==0.1.35 torchvision==0.28.0 prdc==0.2
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	mosaicml-streaming==0.13.0 brotli==1.2.1 python-snappy==0.7.3 cramjam==2.14.0 zstd==1.5.7.2 xxhash==4.1.0 catalogue==2.0.10
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt scikit-learn==1.9.0
	touch $@

$(VENV)-audit/.dev:
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check detect-secrets==1.5.0 pip-audit
	touch $@

# mypy does not follow the renaming of an editable install.
$(LOCAL)/types:
	mkdir -p $@
	ln -sfn ../../flows $@/selfcascade_flows
	ln -sfn ../../tasks $@/selfcascade_tasks
