"""How kernels are launched: every launch of this package goes through `launch`, with a config from `CONFIGS`.

A config holds what changes speed and not results: block sizes, warps, pipeline stages. The first one is taken that fits
the device's shared memory and leaves the device enough programs; nothing is timed at run time, so that a length or
batch size never met before costs nothing, and reruns are bitwise equal.

What compiles is not therefore right: of configs that were tried, some read shared memory out of bounds, and some wrote
wrong results (docs/kernels.md). The tests run each of those here on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton.language as tl
from triton.runtime.errors import OutOfResources

Config = dict[str, int]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]

# By kernel, or by kernel and a constant; best first, the last one is to fit 64 KiB. BB, BV: the channels of K and the
# columns of V that a program takes at a time; STAGES of its loop over chunks; TURNED: its state is held transposed; the
# rest is Triton's own. When a config is to be taken:
#   SINCE, BEFORE   on a GPU of that capability, of an earlier one
#   BF16            with operands of bf16, as others take more registers
#   FULL            with those where K is the whole block, as a mask takes some, too
#   PROGRAMS        where it leaves so many, as wider blocks make fewer; on Hopper, bf16, K from 65 to 128
_BACK = [
    {"BV": 64, "num_warps": 4, "STAGES": 3, "TURNED": 0, "SINCE": 90, "BEFORE": 100, "BF16": 1},
    {"BV": 64, "num_warps": 4, "STAGES": 2, "TURNED": 0, "SINCE": 90, "BEFORE": 100, "BF16": 1},
    {"BV": 32, "num_warps": 4, "STAGES": 2, "TURNED": 0, "BF16": 1},
    {"BV": 16, "num_warps": 4, "STAGES": 2, "TURNED": 0},
]
CONFIGS: dict[str, list[Config]] = {
    "precondition_solve_kernel": [{"BB": 16, "num_warps": 1}],
    "precondition_fwd_kernel": [{"num_warps": 2, "STAGES": 3}, {"num_warps": 4, "STAGES": 1}],
    "precondition_fwd_kernel, WALK = True": [
        {"num_warps": 2, "STAGES": 3, "BEFORE": 100},
        {"num_warps": 4, "STAGES": 3, "SINCE": 100},
        {"num_warps": 4, "STAGES": 1},
    ],
    "precondition_check_kernel": [{"BB": 32, "num_warps": 2}],
    "precondition_map_kernel": [
        {"BV": 64, "num_warps": 4, "STAGES": 3, "SINCE": 90, "BEFORE": 100},
        {"BV": 32, "num_warps": 4, "STAGES": 3, "SINCE": 80},
        {"BV": 16, "num_warps": 4, "STAGES": 1},
    ],
    "chain_kernel": [
        {"BV": 16, "num_warps": 4, "STAGES": 3, "SINCE": 90},
        {"BV": 32, "num_warps": 4, "STAGES": 1},
        {"BV": 16, "num_warps": 4, "STAGES": 1},
    ],
    "chain_kernel, V = 1": [
        {"BV": 1, "num_warps": 8, "STAGES": 3},
        {"BV": 1, "num_warps": 8, "STAGES": 1},
    ],
    "precondition_expand_kernel": [
        {"num_warps": 4, "maxnreg": 168, "SINCE": 90, "BEFORE": 100, "FULL": 1},
        {"num_warps": 4},
    ],
    # Held to so few registers, what Triton 3.6 makes of a walk spills.
    "precondition_expand_kernel, WALK = True": [{"num_warps": 4}],
    "precondition_local_kernel": [
        {"BB": 64, "num_warps": 4, "maxnreg": 128, "SINCE": 90, "FULL": 1},
        {"BB": 64, "num_warps": 4},
    ],
    "precondition_bwd_kernel": [{"num_warps": 2, "STAGES": 3}, {"num_warps": 4, "STAGES": 1}],
    "precondition_grads_kernel": [{"num_warps": 8, "SINCE": 80}, {"num_warps": 4, "BEFORE": 80}],
    "delta_intra_fwd_kernel": [
        {"BB": 128, "num_warps": 4, "maxnreg": 168, "SINCE": 90, "BEFORE": 100, "FULL": 1},
        {"BB": 128, "num_warps": 4, "FULL": 1},
        {"BB": 32, "num_warps": 4, "BEFORE": 100},
        {"BB": 32, "num_warps": 4, "num_stages": 1, "SINCE": 100},  # Triton 3.6 cannot pipeline it there
    ],
    "delta_intra_fwd_kernel, DECAY = 2": [
        {"BB": 32, "num_warps": 2, "SINCE": 90, "FULL": 1},
        {"BB": 16, "num_warps": 4},
    ],
    "delta_channels_kernel": [{"BB": 32, "num_warps": 4}],
    "delta_inter_fwd_kernel": [
        {"BV": 128, "num_warps": 8, "STAGES": 3, "SINCE": 90, "PROGRAMS": 128},
        {"BV": 64, "num_warps": 4, "STAGES": 3, "SINCE": 90, "BEFORE": 100, "BF16": 1},
        {"BV": 64, "num_warps": 4, "STAGES": 2, "SINCE": 90, "BEFORE": 100, "BF16": 1},
        {"BV": 32, "num_warps": 4, "STAGES": 2, "BF16": 1},
        {"BV": 16, "num_warps": 4, "STAGES": 2},
    ],
    "delta_inter_bwd_kernel": _BACK,
    "delta_inter_bwd_kernel, DECAY = 0": [
        {"BV": 128, "num_warps": 8, "STAGES": 2, "TURNED": 1, "SINCE": 90, "PROGRAMS": 128},
        *_BACK,
    ],
    "delta_inter_bwd_kernel, DECAY = 2": [
        {"BV": 128, "num_warps": 8, "STAGES": 3, "TURNED": 1, "SINCE": 90, "PROGRAMS": 128},
        *_BACK,
    ],
    "delta_intra_bwd_kernel": [
        {"BB": 128, "BV": 32, "num_warps": 8, "SINCE": 90, "FULL": 1},
        {"BB": 32, "BV": 32, "num_warps": 8, "FULL": 1},
        {"BB": 16, "BV": 16, "num_warps": 4},
    ],
    "delta_intra_bwd_kernel, DECAY = 1": [
        {"BB": 32, "BV": 64, "num_warps": 4, "SINCE": 90, "FULL": 1},
        {"BB": 16, "BV": 32, "num_warps": 8, "FULL": 1},
        {"BB": 16, "BV": 16, "num_warps": 4},
    ],
    "delta_intra_bwd_kernel, DECAY = 2": [
        {"BB": 16, "BV": 32, "num_warps": 2, "SINCE": 90, "FULL": 1},
        {"BB": 16, "BV": 64, "num_warps": 4, "FULL": 1},
        {"BB": 16, "BV": 16, "num_warps": 4},
    ],
}
_CONDITIONS = ("SINCE", "BEFORE", "BF16", "FULL")

_left: dict[tuple[Any, ...], list[tuple[Config, int]]] = {}
"""Of what was launched, the options that the device has not refused, and from how many programs on."""
_constants: dict[str, list[str]] = {}
_HERE = nullcontext()


@cache
def capability(device: torch.device) -> int:
    """That of an NVIDIA GPU, 90 for Hopper; 0 for a GPU of another make. The interpreter passes for Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    return 10 * major + minor


def serves(config: Config, since: int) -> bool:
    """Whether a config is for devices of that capability."""
    return config.get("SINCE", 0) <= since < config.get("BEFORE", 1000)


def configs(name: str, arguments: dict[str, Any], since: int) -> list[Config]:
    """Those of a launch on a device of that capability, best first, with blocks no wider than what they split."""
    own = (f"{name}, {n} = {arguments.get(n)}" for n in ("DECAY", "V", "WALK"))
    found = next((CONFIGS[key] for key in own if key in CONFIGS), CONFIGS[name])
    K, BK = arguments.get("K", 0), arguments.get("BK", 0)
    V = arguments.get("V", K)
    most = {"BB": BK, "BV": max(16, 1 << (V - 1).bit_length())}
    if BK < 64:  # products of few columns by two groups of warps read out of bounds
        most["num_warps"] = 4
    bf16 = arguments.get("DT") is not tl.float32
    fits = {
        "BF16": bf16,
        "FULL": bf16 and K == BK,
        "PROGRAMS": bf16 and BK == 128 and most["BV"] >= 128 and since == 90,
    }
    return [
        {n: min(x, most.get(n, x)) for n, x in config.items() if n not in _CONDITIONS}
        for config in found
        if serves(config, since) and all(map(fits.get, fits.keys() & config))
    ]


def options(config: Config) -> Config:
    """What of a config the kernel takes. Whether x y + z is fused Triton is told, since its default depends on its
    version, and Triton 3.9 warns where it has to choose."""
    return {n: x for n, x in config.items() if n != "PROGRAMS"} | {"enable_fp_fusion": True}


def launch(kernel: Any, grid: Grid, device: torch.device, **arguments: Any) -> None:
    """Run `kernel` over `grid(arguments and config)`; all arguments by keyword."""
    name = kernel.__name__
    if name not in _constants:
        _constants[name] = list(kernel.fn.__annotations__)  # none but constexprs are annotated
    key = (name, device, *map(arguments.get, _constants[name]))
    if key not in _left:
        found = configs(name, arguments, capability(device))
        _left[key] = [(options(config), config.get("PROGRAMS", 0)) for config in found]
    while True:
        *others, (last, _) = left = _left[key]
        config = next((c for c, least in others if not least or grid({**arguments, **c})[0] >= least), last)
        try:
            with on(device):
                _run(kernel, grid, arguments, config)
            return
        except OutOfResources:
            if len(left) == 1:
                raise
            _left[key] = [(c, least) for c, least in left if c is not config]


def _run(kernel: Any, grid: Grid, arguments: dict[str, Any], config: Config) -> None:
    kernel[grid({**arguments, **config})](**arguments, **config)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return _HERE if here else torch.cuda.device(device)
