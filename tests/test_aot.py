"""The parsers and verdicts of aot.py, on text that cuobjdump and nvdisasm printed."""

from __future__ import annotations

import aot
import aot_triton
import torch

SYMBOL = "_ZN3pvk3nms15nms_mask_kernelIfEEvNS0_9NmsParamsE"


def usage(stack: int) -> str:
    return f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {SYMBOL}:
  REG:30 STACK:{stack} SHARED:1280 LOCAL:0 CONSTANT[0]:672 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_parse_reads_registers_shared_memory_and_name():
    (kernel,) = aot.parse(usage(0), "nms", "90")
    assert (kernel.name, kernel.registers, kernel.shared) == ("nms_mask_kernel<float>", 30, 1280)
    assert aot.check_spills([kernel], {}) == []


def test_stack_frame_fails_unless_excused():
    kernels = aot.parse(usage(8), "nms", "90")
    (problem,) = aot.check_spills(kernels, {})
    assert "nms_mask_kernel<float>" in problem
    assert aot.check_spills(kernels, {"sm_90 nms_mask_kernel<float>": "known"}) == []


def test_excuse_that_no_longer_applies_fails():
    kernels = aot.parse(usage(0), "nms", "90")
    (problem,) = aot.check_spills(kernels, {"sm_90 nms_mask_kernel<float>": "known"})
    assert "needs no stack frame" in problem
    # An architecture that was not compiled says nothing.
    assert aot.check_spills(kernels, {"sm_80 nms_mask_kernel<float>": "known"}) == []


def test_missing_opcode_fails(monkeypatch):
    monkeypatch.setattr(aot, "OPCODES", {"nms": [("nms_mask_kernel", r"LDS\.128", "one read a box")]})
    monkeypatch.setattr(aot, "FORBIDDEN", {"nms": [("nms_mask_kernel", r"\bATOMG\.", "no atomics")]})
    kernels = aot.parse(usage(0), "nms", "90")
    listing = '\t.section\t.text.{},"ax",@progbits\n.L_x_0:\n  /*0010*/  {} R4, [R2] ;\n\t.section\t.nv.info\n'
    assert aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "LDS.128"))) == []
    (missing,) = aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "LDS.64")))
    assert "LDS" in missing
    both = aot.check_opcodes(kernels, aot.split_sass(listing.format(SYMBOL, "ATOMG.E.OR")))
    assert len(both) == 2


def compiled(**found):
    variant = aot_triton.Variant("90", "forward", torch.bfloat16, "ieee", (128, 128, 64, 8, 3))
    return aot_triton.Compiled(
        variant, "conv2d_kernel", **{"opcodes": {"HGMMA", "UTMALDG"}, "descriptors": True, **found}
    )


def test_triton_kernel_fails_for_spills_shared_memory_and_opcodes():
    assert aot_triton.problems_of(compiled()) == []
    for found, word in (
        ({"stack": 8}, "stack frame 8 bytes"),
        ({"spilled": 4}, "4 bytes spilled"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"opcodes": {"HMMA", "UTMALDG"}}, "expected HGMMA"),
        ({"opcodes": {"HGMMA", "LDGSTS"}}, "expected UTMALDG"),
        ({"problem": "ptxas failed"}, "ptxas failed"),
    ):
        (problem,) = aot_triton.problems_of(compiled(**found))
        assert word in problem


def test_every_configuration_of_sm_90_is_compiled():
    from pyvision_kernels.ops.conv2d.triton_configs import shapes

    variants = aot_triton.variants(["90"], False)
    for configs in shapes(90, torch.bfloat16, "ieee").values():
        for config in configs:
            found = {variant.direction for variant in variants if variant.config == config}
            assert found == {"forward", "backward_input", "backward_weight"}
