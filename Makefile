.PHONY: check test format

BIN := $(wildcard .venv/bin/)

check:  ## formatting, lint and types; changes nothing
	$(BIN)ruff format --check .
	$(BIN)ruff check .
	$(BIN)mypy

format:  ## make the formatting right, and mend what lint can mend
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

test:  ## set up what is missing, then check and test; ARGS go to pytest
	./launchers/test.sh $(ARGS)
