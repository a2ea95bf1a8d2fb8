"""The parsers and verdicts of aot.py, on text that ptxas and nvdisasm printed."""

from __future__ import annotations

import aot
import pytest

SYMBOL = "_ZN3pvk3nms15nms_mask_kernelIfEEvNS0_9NmsParamsE"


def ptxas(stack: int, stores: int, loads: int) -> str:
    return f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90'
ptxas info    : Function properties for {SYMBOL}
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 1280 bytes smem, 600 bytes cmem[0]
ptxas info    : Compile time = 9.1 ms
"""


def test_parse_reads_registers_shared_memory_and_name():
    (kernel,) = aot.parse(ptxas(0, 0, 0), "nms", "90")
    assert (kernel.name, kernel.registers, kernel.shared) == ("nms_mask_kernel<float>", 30, 1280)
    assert aot.check_spills([kernel], {}) == []


@pytest.mark.parametrize("counts", [(8, 0, 0), (0, 4, 0), (0, 0, 4)])
def test_spill_or_stack_frame_fails_unless_excused(counts):
    kernels = aot.parse(ptxas(*counts), "nms", "90")
    (problem,) = aot.check_spills(kernels, {})
    assert "nms_mask_kernel<float>" in problem
    assert aot.check_spills(kernels, {"sm_90 nms_mask_kernel<float>": "known"}) == []


def test_excuse_that_no_longer_applies_fails():
    kernels = aot.parse(ptxas(0, 0, 0), "nms", "90")
    (problem,) = aot.check_spills(kernels, {"sm_90 nms_mask_kernel<float>": "known"})
    assert "does not spill" in problem
    # An architecture that was not compiled says nothing.
    assert aot.check_spills(kernels, {"sm_80 nms_mask_kernel<float>": "known"}) == []


def test_missing_opcode_fails(monkeypatch):
    monkeypatch.setattr(aot, "OPCODES", {"nms": [("nms_mask_kernel", r"LDS\.128", "one read a box")]})
    monkeypatch.setattr(aot, "FORBIDDEN", {"nms": [("nms_mask_kernel", r"\bATOMG\.", "no atomics")]})
    kernels = aot.parse(ptxas(0, 0, 0), "nms", "90")
    listing = '\t.section\t.text.{},"ax",@progbits\n.L_x_0:\n  /*0010*/  {} R4, [R2] ;\n\t.section\t.nv.info\n'
    assert aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "LDS.128"))) == []
    (missing,) = aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "LDS.64")))
    assert "LDS" in missing
    both = aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "ATOMG.E.OR")))
    assert len(both) == 2
