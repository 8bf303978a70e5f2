"""Compiles every kernel for a GPU that need not be there: `python -m tests.support.compile_kernels 90`.

The argument is the GPU's compute capability. Prints what each kernel takes, and asserts that it fits there.
"""

import sys
import time
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llm.devices import kernels

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""What a program may have at the most, in KiB, by the capability of the GPU."""


def compile_all(capability: int) -> None:
    """For a GPU of this capability, which need not be there. Prints what each kernel takes."""
    of_draw = dict.fromkeys(["top", "largest", "temperature", "top_p"], "*fp32")
    of_draw |= dict.fromkeys(["ids", "history", "positions", "chosen", "top_k", "seed", "likeliest"], "*i64") | {
        "active": "*i1",
        "history_stride": "i32",
    }
    of_penalize = dict.fromkeys(["logits", "penalty", "out"], "*fp32")
    of_penalize |= {"history": "*i64", "positions": "*i64", "vocabulary": "i32", "history_stride": "i32"}
    for width in (0, 100, 128, 50_257, 262_144):
        options = kernels._draw_options(width)
        constants = {"WIDTH": width, "BLOCK": options["BLOCK"], "OF_MANY": True}
        constants["OF_FEW"] = width <= kernels.MOST_SORTED
        compile_one(capability, kernels._draw, of_draw, constants, num_warps=options["num_warps"])
    compile_one(capability, kernels._penalize, of_penalize, {"BLOCK": 512}, num_warps=4)
    for dtype in ("fp16", "bf16"):
        of_norm = dict.fromkeys(["x", "weight", "bias", "result"], f"*{dtype}")
        for width, subtracts_mean in ((2048, True), (5000, False), (16384, False)):
            block = 1 << (width - 1).bit_length()
            constants = {"WIDTH": width, "BLOCK": block, "SUBTRACTS_MEAN": subtracts_mean, "HAS_BIAS": subtracts_mean}
            compile_one(
                capability, kernels._norm, of_norm | {"eps": "fp32"}, constants, num_warps=min(block // 512, 16)
            )
        _compile_attention(capability, f"*{dtype}")
        of_linear = of_norm | dict.fromkeys(["tokens", "in_features", "out_features"], "i32")
        of_tile = {"TOKENS": kernels.TILE_TOKENS, "OUTS": kernels.TILE_OUTS, "INS": kernels.TILE_INS}
        for has_bias in (True, False):
            constants = of_tile | {"HAS_BIAS": has_bias}
            assembly = compile_one(capability, kernels._prefill_linear, of_linear, constants, num_warps=4, num_stages=4)
            assert "cp.async.cg.shared.global" in assembly
        for outs in (2048, 6144, 8192):
            tile = kernels._tile(outs)
            for tokens, ahead in zip((16, 32), tile.steps_ahead, strict=True):
                constants = {
                    "HAS_BIAS": True,
                    "TOKENS": tokens,
                    "BLOCK_OUT": tile.outs,
                    "PARTS": tile.parts,
                    "PART_IN": tile.part_in,
                }
                options = {"num_warps": tile.parts, "num_stages": 1 + ahead}
                assembly = compile_one(capability, kernels._linear, of_linear, constants, **options)
                # weights on their way past the registers, 16 bytes at a time, and products by tensor cores
                assert "cp.async.cg.shared.global" in assembly
                assert "cp.async.ca.shared.global" not in assembly
                assert "mma.sync.aligned.m16n8k16" in assembly


def _compile_attention(capability: int, dtype: str) -> None:
    strides = ["head", "token"]
    of_cache = dict.fromkeys([f"cache_{stride}" for stride in ("row", *strides)], "i32")
    of_write = dict.fromkeys(["keys", "values", "cached_keys", "cached_values"], dtype) | of_cache
    of_write |= dict.fromkeys(["rows", "positions"], "*i64")
    of_write |= dict.fromkeys([f"{name}_{stride}" for name in ("keys", "values") for stride in strides], "i32")
    for size, group in ((64, 1), (80, 4), (128, 8), (256, 2)):
        sizes = {"SIZE": size, "SIZE_PADDED": triton.next_power_of_2(size)}
        compile_one(capability, kernels._write, of_write, sizes, num_warps=1)
        of_join = dict.fromkeys(["weighted", "sums", "largest"], "*fp32") | {"positions": "*i64", "output": dtype}
        of_join |= {"output_head": "i32", "output_token": "i32"}
        compile_one(capability, kernels._join, of_join, sizes | {"SPLITS": 8, "SPLIT": kernels.SPLIT}, num_warps=1)
        for tokens in (1, 16):
            tokens = min(tokens, kernels.MOST_QUERIES // group)
            split = kernels.SPLIT if tokens == 1 else 0
            of_attend = dict.fromkeys(["queries", "keys", "values", "bias"], dtype) | of_cache | {"scale": "fp32"}
            of_attend |= dict.fromkeys(["output", "sums", "largest"], "*fp32" if split else dtype)
            of_attend |= dict.fromkeys(["rows", "positions"], "*i64")
            of_attend |= dict.fromkeys(
                [f"{name}_{stride}" for name in ("query", "bias", "output") for stride in strides], "i32"
            )
            constants = sizes | {
                "HAS_BIAS": group == 1,
                "GROUP": group,
                "GROUP_PADDED": group,
                "TOKENS": tokens,
                "MEMBERS": max(kernels.FEWEST_QUERIES, tokens * group),
                "SPLIT": split,
                "BLOCK": kernels.KEY_BLOCK,
            }
            assembly = compile_one(capability, kernels._attend, of_attend, constants, num_warps=4, num_stages=2)
            assert "wgmma" not in assembly, "see MOST_QUERIES"


def compile_one(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> str:
    """Its PTX. `types` are those of the parameters that are no constants."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    # torch's tensors begin at multiples of 16, and the shapes of models are multiples too
    aligned = [name for name in types if types[name][0] == "*" or name in ("in_features", "out_features", "vocabulary")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    start = time.monotonic()
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.monotonic() - start
    shared = compiled.metadata.shared
    print(f"{kernel.__name__} {constants} {types.get('x', '')}: {seconds:.2f} s, {shared} bytes of shared memory")
    assert shared <= SHARED_MEMORY[capability] << 10
    assembly: str = compiled.asm["ptx"]
    return assembly


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
