.PHONY: check check-format lint types test format

BIN := $(wildcard .venv/bin/)

check: check-format lint types  ## changes nothing; `make -k check` goes on after a failure

check-format:
	$(BIN)ruff format --check .

lint:
	$(BIN)ruff check .

types:
	$(BIN)mypy

format:  ## make the formatting right, and mend what lint can mend
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

test:  ## set up what is missing, then check and test; ARGS go to pytest
	./launchers/test.sh $(ARGS)
