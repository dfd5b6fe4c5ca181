"""Kernels compiled for GPUs that are not here: those of the package, and toys that the limits are to catch."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from osdn.ops.triton import aot

KERNELS = Path(aot.__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed (pip install triton)"
)


def python(*arguments, **environment):
    # The interpreter, which other tests use, is chosen when triton is imported: hence processes of their own.
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


def in_source():
    sources = [path.read_text() for path in KERNELS.glob("*.py")]
    names = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)}
    assert names
    return names


@needs_triton
def test_kernels_compile_within_the_limits_of_every_target(tmp_path):
    done = python("-m", "osdn.ops.triton.aot", "--json", str(tmp_path / "aot.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "aot.json").read_text())
    assert written["versions"]["TRITON_DEFAULT_FP_FUSION"] in ("0", "1")
    rows = written["rows"]
    # Each kernel under each decay once, the targets taking turns; `make aot` compiles all for each.
    found = {(row["kernel"], decay) for row in rows for decay in row["decays"].split()}
    only = {"delta_channels_kernel": ("channel",)}
    assert found == {(kernel, decay) for kernel in in_source() for decay in only.get(kernel, aot.DECAYS)}
    assert {row["target"] for row in rows} == set(aot.TARGETS)
    assert all(row["registers"] > 0 for row in rows)


TOYS = """
import triton
import triton.language as tl


@triton.jit
def product_kernel(x, y, steps, bias, BM: tl.constexpr):
    i = tl.arange(0, BM)
    total = tl.zeros([BM, BM], tl.float32)
    for m in tl.range(0, steps):
        a = tl.load(x + i[:, None] * 64 + m * 64 + tl.arange(0, 64)[None, :])
        total += tl.dot(a, tl.trans(a), input_precision="ieee" if a.dtype == tl.float32 else "tf32")
    if bias is not None:
        total += tl.load(bias + i)[None, :]
    tl.store(y + i[:, None] * BM + i[None, :], total)


@triton.jit
def broken_kernel(x, y):
    tl.store(y, tl.load(x) + no_such_name)
"""

DEADLY = """
import multiprocessing
import os

from toys import tl, triton


@triton.jit
def deadly_kernel(x, y):
    tl.store(y, tl.load(x))


hidden = deadly_kernel
del deadly_kernel


def __getattr__(name):
    if name == "deadly_kernel" and multiprocessing.parent_process() is not None:
        os.write(2, b"Assertion `alive' failed.")
        os._exit(7)
    return hidden
"""

RUN = """
import json, os, sys, tempfile
from pathlib import Path
from osdn.ops.triton import aot

with tempfile.TemporaryDirectory() as cache:
    aot.environment(cache)
    import torch
    from deadly import deadly_kernel
    from toys import broken_kernel, product_kernel

    x, y = torch.zeros(4096, 64, dtype=torch.bfloat16), torch.zeros(128, 128)
    small, large = {"BM": 16, "num_warps": 1, "num_stages": 1}, {"BM": 128, "num_warps": 8, "num_stages": 16}
    spilling = {"BM": 64, "num_warps": 1, "num_stages": 1, "maxnreg": 64}
    arguments = {"x": x, "y": y, "steps": 10, "bias": None}
    usual, wide = aot.Case("none"), aot.Case("none", K=256)
    pair = {"x": x, "y": y}
    found = [
        aot.Launch(deadly_kernel, pair, [{"num_warps": 4}], usual),
        aot.Launch(product_kernel, arguments, [small], usual),
        aot.Launch(product_kernel, arguments, [large, small], usual),
        aot.Launch(product_kernel, arguments | {"steps": 11}, [small], wide),
        aot.Launch(product_kernel, arguments, [large], usual),
        aot.Launch(product_kernel, arguments | {"bias": y}, [large], wide),
        aot.Launch(product_kernel, arguments, [spilling], usual),
        aot.Launch(product_kernel, arguments | {"bias": y}, [spilling], wide),
        aot.Launch(broken_kernel, pair, [{"num_warps": 4}], usual),
    ]
    config = aot.Config(all=True, targets=("sm_80",), workers=1, json=Path(sys.argv[1]))
    sys.exit(3 if aot.check({"sm_80": found}, config) else 4)
"""


@needs_triton
def test_toys_over_the_limits_fail_or_are_reported(tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    (tmp_path / "deadly.py").write_text(DEADLY)
    done = python("-c", RUN, str(tmp_path / "aot.json"), PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 4, done.stdout + done.stderr
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == [
        "FAILED: the compiler ended with exit status 7",
        "ok",
        "passed over: shared memory over 163 KiB",
        "ok",
        "FAILED: shared memory over 163 KiB",
        "reported, K = 256: shared memory over 163 KiB",
        "FAILED: spills over 256 B",
        "reported, K = 256: spills over 256 B",
        "FAILED: NameError('no_such_name is not defined')",
    ]
    assert "Assertion `alive' failed." in rows[0]["error"]
    assert all(row["verdict"] in done.stdout for row in rows)
    assert rows[2]["shared"] > 163 * 1024 > rows[1]["shared"]
    assert rows[6]["spilled"] > 256 > rows[1]["spilled"]


PRODUCTS = """
import json, tempfile
from unittest.mock import patch
from osdn.ops.triton import aot

with tempfile.TemporaryDirectory() as cache:
    aot.environment(cache)
    import torch, triton
    from toys import product_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = {"x": torch.zeros(64, 64, dtype=torch.bfloat16), "y": torch.zeros(64, 64), "steps": 10, "bias": None}
    found = aot._specialised(product_kernel, arguments | {"BM": 64}, aot.TARGETS["sm_90"])
    source = ASTSource(product_kernel, *found)
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm
    strays = aot._nvidia(asm)[2]
    with patch.object(aot.sass, "_reads_by_descriptors", lambda *_: False):
        print(json.dumps([strays, aot._nvidia(asm)[2]]))
"""


@needs_triton
def test_products_are_found_in_what_is_compiled(tmp_path):
    (tmp_path / "toys.py").write_text(TOYS)
    done = python("-c", PRODUCTS, PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 0, done.stderr
    strays, products = json.loads(done.stdout)
    assert strays == []
    assert products
    assert all("gdesc" in x for x in products)


LANES = """
import json, re, tempfile
from unittest.mock import patch
from osdn.ops.options import Preconditioner
from osdn.ops.triton import aot

rule = Preconditioner(1.0, "beta_aware", 0.0, 2.0, normalize_step=True)
with tempfile.TemporaryDirectory() as cache:
    aot.environment(cache)
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cases = [aot.Case("none", K, K, torch.float32, preconditioner=rule) for K in (64, 128)]
    cases += [aot.Case("scalar", K, K, preconditioner=rule) for K in (15, 16)]
    boxless = Preconditioner(1.0, "beta_free", -float("inf"), float("inf"))
    cases += [aot.Case("none", 16, 16, preconditioner=boxless, forget=False)]
    with patch.object(aot, "cases", lambda: cases):
        launches = aot.launches("sm_90")
    seen, shuffles = {}, 0
    for launch in launches:
        name, config = launch.kernel.__name__, launch.configs[0]
        if launch.arguments.get("K", 0) > 16 and not launch.arguments.get("WALK") and name != "delta_step_kernel":
            continue
        found = aot._specialised(launch.kernel, launch.arguments | config, aot.TARGETS["sm_90"])
        source = ASTSource(launch.kernel, *found)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=config).asm["ptx"]
        products = set(re.findall(r"mul[.]f32\\s+(%\\w+),", ptx))
        steps = dict(re.findall(r"shfl[.]sync[.]bfly[.]b32\\s+(%\\w+), (%\\w+),", ptx))
        addends = re.findall(r"fma[.]rn[.]f32\\s+%\\w+, %\\w+, %\\w+, (%\\w+);", ptx)
        shuffles += len(steps)
        seen.setdefault(name, []).append(sum(steps.get(x) in products for x in addends))
    assert shuffles
    print(json.dumps(seen))
"""


@needs_triton
def test_lanes_agree_on_sums():
    """Where a lane's product is fused into a sum's first step between lanes, the other's is rounded and it is not."""
    done = python("-c", LANES)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) == 14, seen.keys()
    assert not any(sum(counts) for counts in seen.values()), seen


SANITIZED = """
import json
from unittest.mock import patch
from osdn.ops.triton import aot
import sanitize

with patch.object(aot, "cases", lambda: aot.DECAYS), patch.object(aot, "call", sanitize.main):
    print(json.dumps([x.kernel.__name__ for x in aot.launches("sm_90")]))
"""


@needs_triton
def test_what_is_sanitized_is_every_kernel():
    done = python("-c", SANITIZED, PYTHONPATH=f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == in_source()


def test_no_limit_is_passed_unnoticed():
    case, wide = aot.Case("scalar"), aot.Case("scalar", K=256)

    def verdict(target, x, cases, then=None):
        configs = [{"num_warps": n} for n in (8, 4)]
        return aot.Variant(target, ("m", "k"), configs, [], cases, [x, *([then] if then else [])]).verdict(x)

    for target, kib in (("sm_80", 163), ("sm_90", 227), ("sm_100", 227), ("gfx942", 64)):
        full, over = aot.Compiled(shared=kib * 1024, spilled=256), aot.Compiled(shared=kib * 1024 + 1)
        assert verdict(target, full, [case]) == "ok"
        assert verdict(target, over, [case]) == f"FAILED: shared memory over {kib} KiB"
        assert verdict(target, over, [case], then=full).startswith("passed over")
        assert verdict(target, over, [case], then=aot.Compiled(error="no")).startswith("FAILED")
        assert verdict(target, over, [wide]).startswith("reported")
        # The same compile serves both: the stricter one counts.
        assert verdict(target, over, [wide, case]).startswith("FAILED")
        assert verdict(target, aot.Compiled(spilled=257), [case], then=full).startswith("FAILED")
        assert verdict(target, aot.Compiled(error="no"), [wide]) == "FAILED: no"
        assert verdict(target, aot.Compiled(strays=("HGMMA",)), [wide], then=full).startswith("FAILED: 1 product")
    assert verdict("sm_100", aot.Compiled(tensor_memory=513), [case]).startswith("FAILED")


def test_resources_are_read_from_what_the_compilers_print():
    metadata = ".private_segment_fixed_size: 12\n.vgpr_count:     72\n.private_segment_fixed_size: 300\n"
    assert aot._amd({"amdgcn": metadata}) == (72, 300, ())
    with pytest.raises(ValueError, match="empty"):
        aot._amd({"amdgcn": "another format"})


@needs_triton
def test_interpreted_kernels_are_refused():
    done = python("-m", "osdn.ops.triton.aot", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it\n"


def test_missing_triton_is_one_line():
    without = (
        "import sys; sys.modules['triton'] = None; sys.argv = ['aot']; from osdn.ops.triton import aot; aot.main()"
    )
    done = python("-c", without)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the package triton is not installed (pip install triton; Linux only)\n"
