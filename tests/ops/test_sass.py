"""Machine code in which a product reads by a descriptor, or by what a register held before; as ptxas writes it."""

import pytest

from osdn.ops.triton.sass import strays

LOW = ["USHF.R.U32.HI UR18, URZ, 0x4, UR4", "USGXT.U32 UR18, UR18, 0xe"]
HIGH = ["UMOV UR19, 0x80000020"]
PRODUCT = "HGMMA.64x32x16.F32.BF16 R88, R104, gdesc[UR16].tnspB, R88, gsb0"
BOTH = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], R24"
SPILLED = ["IMAD.U32 R5, RZ, RZ, UR18", "STL [R1+0x8], R5", "LDL.LU R6, [R1+0x8]", "R2UR UR18, R6"]
WIDE = ["LDSM.16.MT88.4 R4, [R1]", "HMMA.16816.F32.BF16 R4, R8, R10, R4", "LDG.E.128 R4, [R2.64]", "CALL.REL `(.L_x_5)"]
UNKNOWN = ["STL [R7], R5", "STL.U8 [R1+0x9], R5", "IADD3 R1, R1, -0x10, RZ"]
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
        # Nor by what is only like it.
        ([*LOW[:1], "USGXT UR18, UR18, 0xe", *HIGH, PRODUCT], 1),
        ([*LOW, *HIGH, "ULOP3.LUT UR18, UR18, 0xfc, URZ, 0x30, !UPT", PRODUCT], 1),
        ([*LOW, *HIGH, "UIADD3.X UR18, UR18, 0x2, URZ, UP0, !UPT", PRODUCT], 1),
        ([*LOW, *HIGH, "IMAD.HI.U32 R5, R6, 0x1, RZ", "R2UR UR18, R5", PRODUCT], 1),
        ([*LOW, "CS2R.32 R6, SRZ", "R2UR UR19, R7", PRODUCT], 1),
        # No longer, where an instruction writes several registers, a call any, or the stack is written or moved.
        *(([*LOW, *HIGH, "IMAD.U32 R6, RZ, RZ, UR18", x, "R2UR UR18, R6", PRODUCT], 1) for x in WIDE),
        *(([*LOW, *HIGH, *SPILLED[:2], x, *SPILLED[2:], PRODUCT], 1) for x in UNKNOWN),
        # On each path: past what a branch may leave out, and in the first round of a loop as in the others.
        ([*HIGH, "@P0 BRA `(.L_x_0)", *LOW, ".L_x_0:", PRODUCT], 1),
        ([*HIGH, *LOW, "@P0 BRA `(.L_x_0)", "UMOV UR5, URZ", ".L_x_0:", PRODUCT], 0),
        ([OTHER, ".L_x_2:", *LOW, *HIGH, PRODUCT, OTHER, AGAIN], 0),
        ([OTHER, ".L_x_2:", *HIGH, PRODUCT, *LOW, AGAIN, PRODUCT], 1),
        ([OTHER, ".L_x_2:", "UIADD3 UR18, UP1, UR18, 0x2, URZ", *HIGH, PRODUCT, *LOW, AGAIN], 1),  # as ptxas 12.8 wrote
        ([*LOW, *HIGH, "BRA `(.L_x_1)", "UMOV UR18, URZ", ".L_x_1:", PRODUCT, "@P0 BRA `(.L_x_9)"], 0),
        (["BRA.DIV UR4, `(.L_x_0)", PRODUCT, "EXIT", *HIGH, *LOW, ".L_x_0:", "EXIT"], 1),
        # Nor where nothing is seen to lead.
        ([*LOW, *HIGH, PRODUCT, "EXIT", PRODUCT], 1),
        ([*LOW, *HIGH, "BRX R4 -0x10", PRODUCT], 1),
        (["another format: HGMMA"], 1),
        ([*LOW, *HIGH, "HGMMA.64x8x16.F16 R0, R4, R8"], 1),
    ],
)  # fmt: skip
def test_strays_are_products_that_may_read_by_anything_but_a_descriptor(lines, found):
    assert len(strays(code(*lines))) == found
