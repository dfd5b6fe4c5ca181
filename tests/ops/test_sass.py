"""Machine code in which a product reads by a descriptor, or by what a register held before; as ptxas writes it."""

import pytest

from osdn.ops.triton.sass import strays

LOW = ["USHF.R.U32.HI UR18, URZ, 0x4, UR4", "USGXT.U32 UR18, UR18, 0xe"]
HIGH = ["UMOV UR19, 0x80000020"]
PRODUCT = "HGMMA.64x32x16.F32.BF16 R88, R104, gdesc[UR16].tnspB, R88, gsb0"
BOTH = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24"
SPILLED = ["IMAD.U32 R5, RZ, RZ, UR18", "STL [R1+0x8], R5", "LDL.LU R6, [R1+0x8]", "R2UR UR18, R6"]
OTHER = "UIMAD.WIDE.U32 UR18, UR6, 0xf0, UR8"
AGAIN = "@P0 BRA `(.L_x_2)"


def code(*lines):
    """As `nvdisasm -c` prints it: labels as they are, each instruction behind its address."""
    printed = [x if x.startswith(".L") else f"        /*{16 * n:04x}*/  {x} ;" for n, x in enumerate(lines)]
    return "\n".join(printed)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        # A descriptor, with constants added, moved, and kept on the stack.
        ([*LOW, *HIGH, PRODUCT], 0),
        ([*LOW, *HIGH, "UIADD3.64 UR18, UR18, 0x3e, URZ", PRODUCT], 0),
        ([*LOW, *HIGH, "UMOV UR8, 0xfffffffe", "UMOV UR9, 0x1", "UIADD3.64 UR18, UR18, -UR8, URZ", PRODUCT], 0),
        ([*LOW, *HIGH, *SPILLED, PRODUCT], 0),
        ([*LOW, *HIGH, "LOP3.LUT R5, R7, 0x3fff, RZ, 0xc0, !PT", "R2UR UR18, R5.reuse", PRODUCT], 0),
        ([*LOW, "CS2R R6, SRZ", "IADD3.X R7, R7, 0x40000040, RZ, P1, !PT", "R2UR UR19, R7", PRODUCT], 0),
        (["HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0"], 0),
        # None, or of one operand alone, or no longer.
        ([PRODUCT], 1),
        ([*LOW, PRODUCT], 1),
        ([*HIGH, PRODUCT], 1),
        ([*LOW, *HIGH, BOTH], 1),
        ([*LOW, *HIGH, "ULDC.64 UR18, c[0x0][0x210]", PRODUCT], 1),
        ([*LOW, *HIGH, "UIADD3 UR18, UR18, UR7, URZ", PRODUCT], 1),
        ([*LOW, *HIGH, "ULDC.64 UR16, c[0x0][0x210]", "ULDC UR17, c[0x0][0x274]", PRODUCT], 0),
        ([*LOW, *HIGH, "@P1 ULDC UR18, c[0x0][0x274]", PRODUCT], 1),
        # On each path: past what a branch may leave out, and in the first round of a loop as in the others.
        ([*HIGH, "@P0 BRA `(.L_x_0)", *LOW, ".L_x_0:", PRODUCT], 1),
        ([*HIGH, *LOW, "@P0 BRA `(.L_x_0)", "UMOV UR5, URZ", ".L_x_0:", PRODUCT], 0),
        ([OTHER, ".L_x_2:", *LOW, *HIGH, PRODUCT, OTHER, AGAIN], 0),
        ([OTHER, ".L_x_2:", *HIGH, PRODUCT, *LOW, AGAIN, PRODUCT], 1),
        ([*LOW, *HIGH, "BRA `(.L_x_1)", "UMOV UR18, URZ", ".L_x_1:", PRODUCT, "EXIT", PRODUCT], 0),
    ],
)  # fmt: skip
def test_strays_are_products_that_may_read_by_anything_but_a_descriptor(lines, found):
    assert len(strays(code(*lines))) == found
