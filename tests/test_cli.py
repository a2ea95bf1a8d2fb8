"""`python -m pyvision_kernels info | verify`."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from pyvision_kernels import _simt
from pyvision_kernels.__main__ import main
from pyvision_kernels._extension import Library


def test_info_names_versions_and_what_was_built(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "CPU kernels", "CUDA kernels", "CUDA build", "CUDA emulator", "in force"):
        assert part in text
    assert torch.__version__.split("+")[0] in text


def test_verify_passes_and_prints_every_op(capsys):
    assert main(["verify", "--small", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "nms" in text
    assert "roi_align" in text
    assert "FAILED" not in text


def test_verify_runs_the_emulator(emulator, capsys):
    assert main(["verify", "nms", "--small", "--device", "simt", "--seed", "5"]) == 0
    assert "on simt" in capsys.readouterr().out
    assert _simt.options() is None


def test_verify_says_why_there_is_no_emulator(monkeypatch):
    monkeypatch.setattr(_simt, "load", lambda: Library("emulated CUDA", None, "not built", "run make test"))
    with pytest.raises(SystemExit, match="expected an emulator for simt, but there is none: not built"):
        main(["verify", "--device", "simt"])


def test_verify_refuses_an_unknown_op():
    with pytest.raises(SystemExit, match=r"expected ops among .*nms.*, but got convolve"):
        main(["verify", "convolve"])


def test_verify_does_without_torchvision(capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert main(["verify", "--small", "--device", "cpu"]) == 0
    assert "torchvision is not installed: compared with the float64 reference alone" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")
def test_verify_fails_on_a_broken_kernel(capsys):
    # A kernel that is wrong by one part in a thousand takes the place of ours in the dispatcher.
    kernel = torch.library.get_kernel("pvk::roi_align", "CPU")

    def broken(keys, *args):
        return kernel.call_boxed(keys, *args) * 1.001

    with torch.library._scoped_library("pvk", "IMPL") as library:
        library.impl("roi_align", broken, "CPU", with_keyset=True, allow_override=True)
        assert main(["verify", "roi_align", "--small", "--device", "cpu"]) == 1
    assert "FAILED roi_align forward" in capsys.readouterr().out
    assert main(["verify", "roi_align", "--small", "--device", "cpu"]) == 0
