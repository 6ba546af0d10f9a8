"""Compiles the Triton kernels ahead of time, without a GPU, and tells what they use.

python tests/gpu/compiled_kernels.py        # every target, field and kernel
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tsqp.algebra.params import FIELDS, Field
from tsqp.gpu.backends import triton_product

CAPABILITIES = (80, 90, 100)
ROWS = (1, triton_product.FEW, triton_product.FEW + 1)
UNITS = {4: "*i32", 3: "*u8", 6: "*i16"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Use:
    """What a kernel takes: registers and spilled bytes of a thread, shared bytes of a block."""

    capability: int
    field: str
    rows: int
    in_bfloat16: bool
    registers: int
    spilled: int
    shared: int
    instructions: str


def compile_kernel(capability: int, field: Field, rows: int, in_bfloat16: bool = False) -> Use:
    is_few = rows <= triton_product.FEW
    tile = triton_product.few_tile(rows, field) if is_few else triton_product.many_tile(field)
    constants = triton_product.constants(
        field, tile, is_few, triton_product.BFLOAT16 if in_bfloat16 else None
    )
    unit = UNITS[field.residue_bytes]
    arguments = {"c_units": unit, "weight_FD": "*i8", "out_units": unit}
    arguments |= dict.fromkeys(("rows", "features", "width"), "i32")
    aligned = [number for number, name in enumerate(arguments) if name != "rows"]
    source = ASTSource(
        fn=triton_product._few_rows if is_few else triton_product._many_rows,
        signature=arguments | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options=triton_product.options(tile),
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    kinds = [kind for kind in ("wgmma", "tcgen05", "mma.sync") if kind in compiled.asm["ptx"]]
    return Use(
        capability, field.name, rows, in_bfloat16, int(found[1]), int(found[2]),
        compiled.metadata.shared, " ".join(kinds),
    )  # fmt: skip


def all_kernels() -> Iterator[Use]:
    for capability in CAPABILITIES:
        for field in FIELDS.values():
            for rows in ROWS:
                for in_bfloat16 in (False, True):
                    yield compile_kernel(capability, field, rows, in_bfloat16)


if __name__ == "__main__":
    for use in all_kernels():
        print(use, flush=True)
