# Two commands to know: `make lab` and `make test`. All they need is Python 3.11 or newer with pip.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Extra arguments, say: make test ARGS="-x -k lora", make lab ARGS="--no-browser --port 9000"
ARGS ?=

.PHONY: help lab test lint test-latest fuzz lock demo pretrain results chapters book book-test bench clean

help:
	@echo "make lab       open your copy of the course, work/, in JupyterLab (the first time it sets up .venv)"
	@echo "make test      check the style, run the package's tests, then every chapter, comparing all outputs"
	@echo "make lint      check the style alone, with ruff (ruff format . and ruff check --fix . mend most of it)"
	@echo "make test-latest  the package's tests with the newest versions of everything, in .venv-latest"
	@echo "make fuzz      many random operations, trainings killed at random moments, more draws of every check"
	@echo "make lock      write constraints.txt from pyproject.toml (all newest: ARGS=--upgrade)"
	@echo "make demo      fine-tune the shipped model with LoRA, in half a minute"
	@echo "make chapters  run all chapters again and save their outputs"
	@echo "make book      the course as web pages: book/_build/html/index.html"
	@echo "make book-test open every page of the book in Chromium and look for faults"
	@echo "make pretrain  train the base model from nothing"
	@echo "make results   measure again what the chapters show from files"
	@echo "make bench     measure speed and memory"
	@echo "make clean     remove .venv and everything else that was made here, but not work/"

$(READY): pyproject.toml constraints.txt setup_env.py
	$(PYTHON) setup_env.py
	touch $@

lab: $(READY)
	$(BIN)/python lab.py $(ARGS)

# Three workers for two cores: one often waits for a process that it has started.
test: lint
	$(BIN)/python -m pytest -n 3 --dist worksteal tests $(ARGS)
	$(BIN)/python -m pytest -n 3 --dist loadfile --nbval chapters $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .

# The newest of all that pyproject.toml allows; CONTRIBUTING.md says what to do when it turns red.
test-latest:
	$(PYTHON) setup_env.py --latest --folder .venv-latest
	.venv-latest/bin/python -m pytest -n 2 --dist worksteal tests $(ARGS)

# Half an hour and more on one core. The seed is printed; MINIPEFT_FUZZ_SEED=... repeats a run.
FUZZ ?= 2000
KILLS ?= 50
fuzz: $(READY)
	MINIPEFT_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 0 -s tests/test_fuzz.py $(ARGS)
	MINIPEFT_FUZZ=$(KILLS) $(BIN)/python -m pytest -n 0 tests/test_kill.py $(ARGS)
	MINIPEFT_DRAWS=5 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_checks_*.py $(ARGS)

# One version of everything, for all systems and Pythons, and for both builds of torch.
# Without ARGS it keeps what is locked and adds what is new.
lock: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip compile pyproject.toml book/requirements.txt --extra all --universal --python-version 3.11 \
		--fork-strategy fewest --no-annotate --custom-compile-command "make lock" \
		--output-file constraints.txt $(ARGS)

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

pretrain: $(READY)
	$(BIN)/minipeft pretrain

chapters: $(READY)
	$(BIN)/python -m minipeft.course.notebook chapters/*.ipynb
	$(BIN)/python -c "from minipeft.course.claims import write_page; write_page()"
	$(BIN)/python -c "from minipeft.course.which_one import write_page; write_page()"

# From the committed outputs: nothing is executed. What it needs comes on top of .venv.
book: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --requirement book/requirements.txt
	rm -rf book/_build/html
	$(BIN)/python book/gather.py book/_build/source
	$(BIN)/python -m sphinx --quiet --builder html --conf-dir book book/_build/source book/_build/html
	@echo "book/_build/html/index.html"

book-test: book
	$(BIN)/python -m pytest -n 2 --dist loadscope book $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/bench.py

# Every recorded result that depends on the base: after a new one. Hours; each script goes on where it was stopped.
results: $(READY)
	for script in gates spread base_card e2e_nlg chapter01 chapter02 chapter03 chapter04 chapter05 chapter06 chapter07 chapter08 \
		chapter10 chapter11 chapter12 chapter13 chapter14 chapter15 chapter16; do $(BIN)/python benchmarks/$$script.py || exit 1; done

clean:
	rm -rf .venv .venv-latest book/_build build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
