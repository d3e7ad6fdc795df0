"""Which implementation runs where, and who may say otherwise."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from laser_kernels import align, choose, dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS = torch.eye(4)
TEMPERATURES = {"temperature": 0.05, "distill_temperature": 0.1, "trajectory_temperature": 0.2}


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)


def test_gpu_takes_triton():
    assert choose("auto", CUDA, torch.bfloat16) == ("triton", "auto")


def test_cpu_takes_chunks(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose("auto", CPU, torch.float32) == ("chunked", "cpu tensors need TRITON_INTERPRET=1")


def test_cpu_takes_triton_under_the_interpreter(device):
    assert choose("auto", torch.device(device), torch.float32)[0] == "triton"


def test_float64_and_machines_without_triton_take_chunks(without_triton):
    assert choose("auto", CUDA, torch.float32) == ("chunked", "triton is not installed")


def test_float64_takes_chunks():
    assert choose("auto", CUDA, torch.float64)[0] == "chunked"


@pytest.mark.parametrize("name", ["chunked", "reference"])
def test_config_can_force_any_path(name):
    assert choose(name, CUDA, torch.float32) == (name, "kernel asks for it")


def test_environment_overrides_config(monkeypatch):
    monkeypatch.setenv("LASER_KERNELS", "reference")
    assert choose("chunked", CPU, torch.float32) == ("reference", "LASER_KERNELS asks for it")
    assert dispatch.implementation("chunked", CPU, torch.float32) is None


def test_what_cannot_run_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cpu tensors need TRITON_INTERPRET=1. Use auto, chunked or reference"):
        align(ROWS, None, None, None, ROWS, torch.arange(4), kernel="triton", **TEMPERATURES)


def test_unknown_name_is_refused_with_the_names_there_are(monkeypatch):
    monkeypatch.setenv("LASER_KERNELS", "cuda")
    with pytest.raises(ValueError, match="LASER_KERNELS = 'cuda': must be one of auto, triton, chunked, reference"):
        align(ROWS, None, None, None, ROWS, torch.arange(4), **TEMPERATURES)


def test_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO, "laser_kernels"):
        for _ in range(3):
            align(ROWS, None, None, None, ROWS, torch.arange(4), kernel="chunked", **TEMPERATURES)
    assert [record.message for record in caplog.records] == [
        "alignment_loss: chunked for torch.float32 on cpu (kernel asks for it)"
    ]


SCRIPT = """
import sys, torch
from laser_kernels import alignment_loss
rows = torch.eye(4).requires_grad_()
terms = alignment_loss(rows, rows, None, None, rows, torch.arange(4), temperature=.1, distill_temperature=.1,
                       trajectory_temperature=.1)
sum(terms).backward()
print("laser_kernels.pair_triton" in sys.modules, "triton" in sys.modules)
"""


@pytest.mark.parametrize("interpret, expected", [("1", "True True"), ("", "False False")])
def test_variable_alone_decides_in_a_fresh_process(interpret, expected, device):
    """TRITON_INTERPRET=1 runs the kernels on CPU tensors; without it a CPU does not even import Triton."""
    if device == "cuda":
        pytest.skip("without a GPU only")
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


def test_variable_set_too_late_is_said():
    """Triton's own functions were defined for a GPU by then, and would fail inside the kernel."""
    script = "import triton, os; os.environ['TRITON_INTERPRET'] = '1'; import torch; from laser_kernels import choose\n"
    script += "print(choose('auto', torch.device('cpu'), torch.float32))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "set after triton had been imported" in found.stdout
