"""Ahead-of-time compilation of the kernels, with no GPU: `python -m osdn.ops.triton.aot`.

No list of kernels is kept here. The public operators are called on small CPU tensors with launches recorded instead of
made; each is specialised as the runtime does (types, alignment, None and 1 as constants) and compiled for all targets.
Shared memory is what the compiler says. Registers and spills, which a driver would tell when it loads the kernel, are
read from the binary: by `cuobjdump` for NVIDIA, in the metadata of the assembly for AMD.

A launch takes the first of its configs that fits the device, and so does this: a config that is too large for a target
is passed over where another one fits, and fails where none does; one that fits is held to the limit on spills. Launches
at K > 128 only have to compile. What is compiled for Hopper, and fits, is searched for products that read where their
operands are not (sass.py), at any K.

Every run compiles anew, in a cache folder of its own: what it reports came from these sources and this compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
import tyro

import osdn
from osdn.nn.conv import short_convolution
from osdn.ops import dispatch
from osdn.ops.options import Preconditioner
from osdn.ops.triton import sass

SPILLED = 256
"""Bytes of local memory that a thread may have."""
K_MAX = 128
"""Launches with more key channels are held to no limit."""
TENSOR_MEMORY = 512
"""Columns that a Blackwell processor has."""
DEADLINE = 600
"""Seconds that a kernel may take to compile."""

DECAYS = ("none", "scalar", "channel")


@dataclass(frozen=True)
class Target:
    """A device to compile for, and the shared memory that one program can have there."""

    backend: str
    arch: int | str
    warp_size: int
    shared: int


TargetName = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
TARGETS: dict[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Case:
    """A way to call the operators. By default, all that adds work to a kernel."""

    decay: str
    K: int = 128
    V: int = 128
    dtype: torch.dtype = torch.bfloat16
    gates: torch.dtype = torch.float32
    preconditioner: Preconditioner | None = Preconditioner(1.0, "beta_aware", 0.0, 2.0)  # noqa: RUF009 (frozen)
    forget: bool = True
    groups: int = 1
    """Value heads of each key head."""
    packed: bool = False
    tokens: int = 160
    chunk_size: int = 64
    qk_l2norm: bool = True


def cases() -> list[Case]:
    """For each decay the default, then what differs from it in rule, shape or dtype, most under every decay."""
    everywhere: list[dict[str, Any]] = [
        {},
        {"tokens": 16384},
        {"preconditioner": None, "forget": False},
        {"preconditioner": Preconditioner(1.0, "beta_free", 0.0, math.inf), "forget": False},
        {"packed": True, "groups": 2},
        {"K": 64, "V": 64},
        {"dtype": torch.float32},
        {"K": 100, "V": 60},
        {"K": 256, "V": 256},
    ]
    once: list[dict[str, Any]] = [
        {"preconditioner": Preconditioner(1.0, "beta_free", -math.inf, math.inf), "forget": False},
        {"preconditioner": Preconditioner(1.0, "beta_aware", 0.0, 2.0, normalize_step=True), "qk_l2norm": False},
        {"chunk_size": 16},
        {"gates": torch.bfloat16},
        {"dtype": torch.float16},
        {"K": 256, "V": 256, "dtype": torch.float32},
    ]
    return [Case(decay, **other) for other in everywhere for decay in DECAYS] + [Case(DECAYS[-1], **x) for x in once]


def call(case: Case) -> None:
    """Forward and backward of both operators and of the short convolution, and one step of decoding."""
    B, T, H, HV = (1 if case.packed else 2), case.tokens, 2, 2 * case.groups
    K, V, p = case.K, case.V, case.preconditioner
    bounds = torch.tensor([0, 70, T]) if case.packed else None
    channels = {"none": None, "scalar": (), "channel": (K,)}[case.decay]

    def leaf(*shape: int, dtype: torch.dtype = case.gates) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    q, k = (leaf(B, T, H, K, dtype=case.dtype) for _ in range(2))
    v, beta = leaf(B, T, HV, V, dtype=case.dtype), leaf(B, T, HV)
    g = None if channels is None else leaf(B, T, HV, *channels)
    forget = leaf(B, T, HV) if case.forget else None
    state = osdn.DeltaState(
        leaf(2, HV, K, V, dtype=torch.float32), None if p is None else leaf(2, HV, K, dtype=torch.float32)
    )
    rule: dict[str, Any] = {"preconditioner": p, "forget": forget, "cu_seqlens": bounds, "backend": "triton"}

    def backward(*outputs: torch.Tensor | None) -> None:
        made = [x for x in outputs if x is not None]
        leaves = [x for x in (q, k, v, beta, g, forget, state.S, state.d) if x is not None]
        torch.autograd.grad(made, leaves, [torch.zeros_like(x) for x in made], allow_unused=True)

    own: dict[str, Any] = {
        "g": g,
        "output_final_state": True,
        "qk_l2norm": case.qk_l2norm,
        "chunk_size": case.chunk_size,
    }
    o, end = osdn.online_scaled_delta_rule(q, k, v, beta, initial_state=state, **own, **rule)
    assert end is not None
    backward(o, end.S, end.d)
    if p is not None:
        backward(*osdn.precondition(k.repeat_interleave(case.groups, 2), beta, initial_d=state.d, **rule))
    sizes = (H * K, H * K, HV * V)
    parts = leaf(B, T, sum(sizes), dtype=case.dtype), leaf(sum(sizes), 1, 4, dtype=case.gates)
    convolved, _ = short_convolution(*parts, sizes, K, None, bounds, "triton")
    torch.autograd.grad(list(convolved), parts, [torch.zeros_like(y) for y in convolved])
    with torch.no_grad():
        osdn.online_scaled_delta_step(
            *(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], state.detach()),
            g=None if g is None else g[:, 0],
            forget=None if forget is None else forget[:, 0],
            preconditioner=p,
            slots=torch.tensor([1]) if case.packed else None,
            qk_l2norm=case.qk_l2norm,
            backend="triton",
        )


@dataclass(frozen=True)
class Launch:
    """One that the host code asked for, with the configs that `launch` would try."""

    kernel: Any
    arguments: dict[str, Any]
    configs: list[dict[str, int]]
    case: Case


def launches(name: str) -> list[Launch]:
    """Those of all cases, with CPU tensors taken for those of a target, since host code asks."""
    from osdn.ops.triton import call as calls
    from osdn.ops.triton import launch

    found, hip = [], TARGETS[name].backend == "hip"
    since = 0 if hip else int(TARGETS[name].arch)
    for case in cases():

        def record(kernel: Any, _grid: Any, arguments: dict[str, Any], _config: Any, case: Case = case) -> None:
            configs = map(launch.options, launch.configs(kernel.__name__, arguments, since))
            found.append(Launch(kernel, arguments, list(configs), case))

        with (
            patch.object(launch, "_run", record),
            patch.object(dispatch, "why_not_triton", lambda _: ""),
            patch.object(torch.version, "hip", "any" if hip else None),
            patch.object(calls, "capability", lambda _: since),
        ):
            call(case)
    return found


@dataclass(frozen=True)
class Compiled:
    """What came of a config. registers: of a thread; spilled: bytes of its local memory; strays: instructions of
    products that may read where their operands are not."""

    shared: int = 0
    tensor_memory: int = 0
    registers: int = 0
    spilled: int = 0
    strays: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""

    def lacks(self, target: Target) -> str:
        """What the target has too little of to run this; empty if nothing."""
        if self.shared > target.shared:
            return f"shared memory over {target.shared // 1024} KiB"
        if self.tensor_memory > TENSOR_MEMORY:
            return f"tensor memory over {TENSOR_MEMORY} columns"
        return ""


@dataclass
class Variant:
    """A specialisation of a kernel (a module's name and its own) for a target, in each config; plain data."""

    target: str
    kernel: tuple[str, str]
    configs: list[dict[str, int]]
    sources: list[tuple[Any, ...]]
    """Signature, constants and attributes."""
    cases: list[Case] = field(default_factory=list, repr=False)
    compiled: list[Compiled] = field(default_factory=list, repr=False)

    def fits(self) -> bool:
        return any(not x.error and not x.lacks(TARGETS[self.target]) for x in self.compiled)

    def verdict(self, x: Compiled) -> str:
        """On one config; it starts with FAILED where the run is to fail."""
        if x.error:
            return "FAILED: " + x.error.strip().splitlines()[-1]
        K = min(case.K for case in self.cases)
        over = "FAILED" if K <= K_MAX else f"reported, K = {K}"
        if lacks := x.lacks(TARGETS[self.target]):
            return f"passed over: {lacks}" if self.fits() else f"{over}: {lacks}"
        if x.strays:
            return f"FAILED: {len(x.strays)} products may read where their operands are not: {x.strays[0]}"
        return f"{over}: spills over {SPILLED} B" if x.spilled > SPILLED else "ok"


def variants(found: Sequence[Launch], name: str) -> list[Variant]:
    """What is to be compiled for a target, each once: launches that agree in all that the compiler sees are one."""
    merged: dict[str, Variant] = {}
    for launch in found:
        kernel = launch.kernel
        sources = [_specialised(kernel, launch.arguments | config, TARGETS[name]) for config in launch.configs]
        own = Variant(name, (kernel.fn.__module__, kernel.fn.__name__), launch.configs, sources)
        own = merged.setdefault(repr(own), own)
        own.cases += [] if launch.case in own.cases else [launch.case]
    return list(merged.values())


def _specialised(kernel: Any, arguments: dict[str, Any], target: Target) -> tuple[Any, ...]:
    """By the runtime's own means: on a GPU, the same call would compile the same."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(target.backend, target.arch, target.warp_size))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    return tuple(kernel._pack_args(backend, arguments, bound, specialization, options)[1:])


def compile_all(todo: Sequence[Variant], *, every: bool, workers: int) -> None:
    """Fill in `compiled`: of each variant all configs, or those up to the first that fits.

    Each has a process of its own, as a compiler that fails may take its process down. They are forks of one that has
    imported all there is to import, and no more.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["osdn", "triton", *{x.kernel[0] for x in todo}])
    rest = deque(todo)
    busy: dict[Connection, tuple[Variant, Any, Path, float]] = {}
    while rest or busy:
        while rest and len(busy) < workers:
            variant, (pipe, theirs) = rest.popleft(), context.Pipe(duplex=False)
            said = Path(tempfile.mkstemp(dir=os.environ["TRITON_CACHE_DIR"])[1])
            process = context.Process(target=_compile, args=(variant, every, theirs, said), daemon=True)
            process.start()
            theirs.close()
            busy[pipe] = variant, process, said, time.monotonic() + DEADLINE
        ready = wait(list(busy), timeout=1)
        for pipe, (variant, process, said, deadline) in list(busy.items()):
            error = ""
            if time.monotonic() > deadline:
                error = f"no end in {DEADLINE} s"
                process.kill()
            elif pipe not in ready:
                continue
            try:
                variant.compiled.append(pipe.recv())
                continue
            except EOFError:
                process.join()
            del busy[pipe]
            if process.exitcode:
                printed = re.findall(r".*(?:error:|ERROR:|Error:|Assertion).*", said.read_text(errors="replace"))
                error = error or f"the compiler ended with exit status {process.exitcode}"
                variant.compiled.append(Compiled(error="\n".join([*dict.fromkeys(x[:500] for x in printed), error])))
                if every and len(variant.compiled) < len(variant.configs):
                    rest.append(variant)
            if sys.stderr.isatty():
                print(f"\r{len(todo) - len(rest) - len(busy)} of {len(todo)}", end="", file=sys.stderr, flush=True)


def _compile(variant: Variant, every: bool, pipe: Connection, said: Path) -> None:
    """In a process of its own. What compilers print, down to those in C++, goes into a file."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target, kernel = TARGETS[variant.target], getattr(importlib.import_module(variant.kernel[0]), variant.kernel[1])
    for source, config in list(zip(variant.sources, variant.configs))[len(variant.compiled) :]:
        began, gpu = time.perf_counter(), GPUTarget(target.backend, target.arch, target.warp_size)
        try:
            made = triton.compile(ASTSource(kernel, *source), target=gpu, options=config)
        except Exception as error:  # whatever it is, the other kernels still compile
            variant.compiled.append(Compiled(error=f"{type(error).__name__}: {error}"))
        else:
            seconds, columns = time.perf_counter() - began, getattr(made.metadata, "tmem_size", None) or 0
            registers, spilled, strays = (_amd if target.backend == "hip" else _nvidia)(made.asm)
            variant.compiled.append(Compiled(made.metadata.shared, columns, registers, spilled, strays, seconds))
        pipe.send(variant.compiled[-1])
        if not every and (variant.fits() or variant.compiled[-1].error):
            return


def _nvidia(asm: dict[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    """STACK is the local memory of a thread, which is where registers are spilled to."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()

        def says(tool: Any, option: str) -> str:
            return subprocess.run([tool.path, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = says(knobs.nvidia.cuobjdump, "--dump-resource-usage")
        code = says(knobs.nvidia.nvdisasm, "-c") if "wgmma" in asm["ptx"] else ""
    return _largest(r"\bREG:(\d+)", usage), _largest(r"\bSTACK:(\d+)", usage), tuple(sass.strays(code))


def _amd(asm: dict[str, Any]) -> tuple[int, int, tuple[str, ...]]:
    """The private segment is the local memory of a lane."""
    text = asm["amdgcn"]
    return _largest(r"\.vgpr_count:\s+(\d+)", text), _largest(r"\.private_segment_fixed_size:\s+(\d+)", text), ()


def _largest(pattern: str, text: str) -> int:
    """Of the functions in a binary; ValueError where the pattern is met nowhere, which would pass for zero."""
    return max(int(x) for x in re.findall(pattern, text))


def rows(done: Sequence[Variant]) -> list[dict[str, Any]]:
    """One for each compile; cases: what is not as usual in the calls that this serves."""
    return [
        {
            "kernel": variant.kernel[1],
            "decays": " ".join(x for x in DECAYS if x in {case.decay for case in variant.cases}),
            "target": variant.target,
            "config": _short(config, {"enable_fp_fusion": True}),
            **asdict(x),
            "verdict": variant.verdict(x),
            "cases": list(dict.fromkeys(_short(vars(case), vars(Case(case.decay))) for case in variant.cases)),
        }
        for variant in done
        for config, x in zip(variant.configs, variant.compiled)
    ]


def _short(values: dict[str, Any], usual: dict[str, Any]) -> str:
    return " ".join(f"{n}={x}" for n, x in values.items() if n not in usual or x != usual[n]) or "usual"


def table(made: Sequence[dict[str, Any]]) -> str:
    lines = [["kernel", "decays", "target", "config", "KiB", "registers", "spilled", "seconds", "verdict", "case"]]
    for row in sorted(made, key=lambda row: row["kernel"]):
        figures = [f"{row['shared'] / 1024:.1f}", row["registers"], row["spilled"], f"{row['seconds']:.1f}"]
        first, *more = row["cases"]
        case = first + (f" and {len(more)} more" if more else "")
        lines.append([str(row[n]) for n in lines[0][:4]] + [*map(str, figures), row["verdict"], case])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


@dataclass(frozen=True)
class Config:
    """Compile the Triton kernels for GPUs that need not be here, and hold them to limits of shared memory and spills.

    Exits with 1 where a kernel does not compile or a limit is passed."""

    all: bool = False
    """Every launch and config for every target; otherwise one of each kernel and decay, the targets taking turns."""
    targets: tuple[TargetName, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    workers: int = 2
    """Processes that compile."""
    json: Path | None = None
    """Where to write all figures."""


def _one_each(found: dict[str, list[Launch]]) -> dict[str, list[Launch]]:
    """The first launch of each kernel and decay (`cases` begins with the largest), the targets taking turns."""
    kernels = sorted({launch.kernel.__name__ for own in found.values() for launch in own})
    taken = {}
    for turn, (name, own) in enumerate(found.items()):
        firsts = {(x.kernel.__name__, x.case.decay): x for x in reversed(own)}
        # Decays that a kernel does not ask for stay with one target, where they are one kernel.
        turns = {key: kernels.index(key[0]) + x.arguments.get("DECAY", 0) for key, x in firsts.items()}
        taken[name] = [x for key, x in firsts.items() if turns[key] % len(found) == turn]
    return taken


def check(found: dict[str, list[Launch]], config: Config) -> bool:
    """Compile the launches (by target), print the table; whether all is well."""
    import triton

    began = time.perf_counter()
    if not config.all:
        found = _one_each(found)
    todo = [x for name in config.targets for x in variants(found[name], name)]
    print(f"{len(todo)} kernels, specialised for their targets, to compile", file=sys.stderr, flush=True)
    compile_all(todo, every=config.all, workers=config.workers)
    made = rows(todo)
    failed = [row for row in made if row["verdict"].startswith("FAILED")]
    print(table(made), *dict.fromkeys(row["error"] for row in failed if row["error"]), sep="\n")
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    versions |= {"TRITON_DEFAULT_FP_FUSION": os.environ["TRITON_DEFAULT_FP_FUSION"]}
    print(f"{len(made)} compiles in {time.perf_counter() - began:.0f} s, {len(failed)} failed; {versions}")
    if config.json is not None:
        config.json.write_text(json.dumps({"versions": versions, "rows": made}, indent=1, default=str) + "\n")
    return not failed


def environment(cache: str) -> None:
    """Before triton is imported. Exits where nothing can be compiled."""
    if importlib.util.find_spec("triton") is None:
        sys.exit("the package triton is not installed (pip install triton; Linux only)")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    # For kernels that are not launched by `launch`, which says so itself; Triton 3.9 warns where nothing does.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ["TRITON_CACHE_DIR"] = cache


def main() -> None:
    config = tyro.cli(Config, config=(tyro.conf.FlagCreatePairsOff,))
    with tempfile.TemporaryDirectory() as cache:
        environment(cache)
        sys.exit(0 if check({name: launches(name) for name in config.targets}, config) else 1)


if __name__ == "__main__":
    main()
