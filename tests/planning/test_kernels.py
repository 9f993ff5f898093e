"""Kernels read from the text of compiled programs: what they compute and what they move."""

# ruff: noqa: E501
# Instructions of XLA stand on one line each.

import pytest

from loro_jax.planning.accelerators import ACCELERATORS, accelerator_of
from loro_jax.planning.hlo import read_instructions
from loro_jax.planning.kernels import Kernel, read_kernels

# Five layers of a product with weights that are stacked, (5, 64, 32), as a GPU runs it: each call
# slices its layer's weights off the stack and writes its result into one; cuBLAS needs scratch.
GPU = """
%fused (stack: bf16[5,64,32], x: bf16[16,32], out: bf16[5,16,64], i: s32[]) -> bf16[5,16,64] {
  %stack = bf16[5,64,32]{2,1,0} parameter(0)
  %x = bf16[16,32]{1,0} parameter(1)
  %out = bf16[5,16,64]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %zero = s32[] constant(0)
  %wide = f32[5,64,32]{2,1,0} convert(%stack)
  %one = f32[1,64,32]{2,1,0} dynamic-slice(%wide, %i, %zero, %zero), dynamic_slice_sizes={1,64,32}
  %W = bf16[64,32]{1,0} bitcast(%one)
  %call = (bf16[16,64]{1,0}, s8[4096]{0}) custom-call(%x, %W), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/while/body/mlp/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]},"precision_config":{"operand_precision":["DEFAULT","DEFAULT"]}}}
  %y = bf16[16,64]{1,0} get-tuple-element(%call), index=0
  %y3 = bf16[1,16,64]{2,1,0} bitcast(%y)
  %scratch = s8[4096]{0} get-tuple-element(%call), index=1
  %updated = bf16[5,16,64]{2,1,0} dynamic-update-slice(%out, %y3, %i, %zero, %zero)
  ROOT %results = (bf16[5,16,64]{2,1,0}, s8[4096]{0}) tuple(%updated, %scratch)
}

%body (state: (s32[], bf16[5,64,32], bf16[16,32], bf16[5,16,64])) -> (s32[], bf16[5,64,32], bf16[16,32], bf16[5,16,64]) {
  %state = (s32[], bf16[5,64,32]{2,1,0}, bf16[16,32]{1,0}, bf16[5,16,64]{2,1,0}) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %weights = bf16[5,64,32]{2,1,0} get-tuple-element(%state), index=1
  %x = bf16[16,32]{1,0} get-tuple-element(%state), index=2
  %out = bf16[5,16,64]{2,1,0} get-tuple-element(%state), index=3
  %kernel = (bf16[5,16,64]{2,1,0}, s8[4096]{0}) fusion(%weights, %x, %out, %at), kind=kCustom, calls=%fused
  %new = bf16[5,16,64]{2,1,0} get-tuple-element(%kernel), index=0
  ROOT %next = (s32[], bf16[5,64,32]{2,1,0}, bf16[16,32]{1,0}, bf16[5,16,64]{2,1,0}) tuple(%at, %weights, %x, %new)
}

ENTRY %main (state: (s32[], bf16[5,64,32], bf16[16,32], bf16[5,16,64])) -> (s32[], bf16[5,64,32], bf16[16,32], bf16[5,16,64]) {
  %state = (s32[], bf16[5,64,32]{2,1,0}, bf16[16,32]{1,0}, bf16[5,16,64]{2,1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[5,64,32]{2,1,0}, bf16[16,32]{1,0}, bf16[5,16,64]{2,1,0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""

# A TPU keeps S(1) on the chip, copies to it, notes no trip counts, and calls products convolutions.
TPU = """
%body_less (state: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %copy-start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %y = f32[8,8]{1,0:T(8,128)S(1)} convolution(%near, %near), dim_labels=bf_oi->bf, operand_precision={highest,highest}, metadata={op_name="jit(f)/optimizer/dot_general"}
  ROOT %next = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%at, %x)
}

ENTRY %main (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%state), condition=%body_less, body=%body
}
"""


def test_a_call_moves_its_slice_of_a_stack_and_no_scratch():
    (kernel,) = read_kernels(GPU)
    product, result, weights, x, at = 2 * 16 * 32 * 64, 2 * 16 * 64, 2 * 64 * 32, 2 * 16 * 32, 4
    assert kernel == Kernel("mlp", 5 * product, 5 * (result + weights + x + at), "bfloat16", 5)


def test_memory_on_the_chip_takes_no_time():
    copy, product = read_kernels(TPU)
    assert copy == Kernel("rest", 0, 7 * 4 * 8 * 128, "bfloat16", 7)
    assert product == Kernel("optimizer", 7 * 2 * 8 * 8 * 128, 0, "exact", 7)


# Batch axes of products, and how a TPU's compiler writes them.
@pytest.mark.parametrize(
    "line",
    [
        "f32[4,6,32,8]{3,2,1,0:T(8,128)} convolution(%x, %y), window={size=4x6 stride=3x5 "
        "lhs_dilate=4x6}, dim_labels=01bf_01oi->01bf",
        "f32[4,6,32,8]{3,2,1,0:T(8,128)} convolution(%x, %y), window={size=4x6 stride=4x6 "
        "pad=3_3x5_5 lhs_dilate=3x5 rhs_reversal=1x1}, dim_labels=01bf_01oi->01bf",
        "f32[4,6,32,8]{3,2,1,0} dot(%x, %y), lhs_batch_dims={0,1}, lhs_contracting_dims={3}, "
        "rhs_batch_dims={0,1}, rhs_contracting_dims={3}",
    ],
)
def test_batched_products_are_counted_once_per_member(line):
    (kernel,) = read_kernels(f"""
ENTRY %main (x: f32[4,6,32,16], y: f32[4,6,8,16]) -> f32[4,6,32,8] {{
  %x = f32[4,6,32,16]{{3,2,1,0}} parameter(0)
  %y = f32[4,6,8,16]{{3,2,1,0}} parameter(1)
  ROOT %z = {line}
}}
""")
    assert kernel.flops == 2 * 4 * 6 * 32 * 8 * 16
    assert kernel.precision == "float32"


def test_cudnn_computes_the_lower_half_of_the_scores():
    (kernel,) = read_kernels("""
ENTRY %main (q: bf16[2,64,4,32]) -> bf16[2,64,4,32] {
  %q = bf16[2,64,4,32]{3,2,1,0} parameter(0)
  ROOT %y = (bf16[2,4,64,32]{3,1,2,0}, u8[512]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "64", "64"]}}}
}
""")
    assert kernel.flops == 2 * (2 * 2 * 4 * 64 * 64 * 32) / 2
    assert kernel.bytes == 4 * 2 * 2 * 64 * 4 * 32


def test_conditionals_that_xla_adds_are_read_whole_when_an_approximate_step_is():
    program = """
%small (x: f32[8]) -> f32[8] {{
  ROOT %x = f32[8]{{0}} parameter(0)
}}

%large (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{{0,1}},{{1,0}}}}
}}

ENTRY %main (p: pred[], x: f32[8]) -> f32[8] {{
  %p = pred[] parameter(0)
  %x = f32[8]{{0}} parameter(1)
  ROOT %z = f32[8]{{0}} conditional(%p, %x, %x), true_computation=%large, false_computation=%small, metadata={{op_name="jit(f)/{scope}"}}
}}
"""

    def read(scope):
        return len(read_instructions(program.format(scope=scope), ["collective-permute"], min))

    assert read("optimizer/cond") == 0
    assert read("mlp/dot_general") == 1


def test_a_kernel_takes_the_longer_of_computing_and_moving():
    h100 = ACCELERATORS["h100"]
    assert Kernel("mlp", 989e12, 0, "bfloat16", 1).seconds(h100) == 1
    assert Kernel("mlp", 989e12, 2 * 3.35e12, "bfloat16", 1).seconds(h100) == 2
    assert Kernel("mlp", 67e12, 0, "exact", 1).seconds(h100) == 1


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU v4", None),
    ],
)
def test_devices_are_known_by_the_names_that_jax_gives_them(kind, name):
    assert accelerator_of(kind) is (ACCELERATORS[name] if name else None)
