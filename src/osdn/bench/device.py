"""The clock and the memory of a device.

A timed call starts with an empty queue and a cold cache: a buffer larger than any L2 is written first, which also gives
the host time to get ahead, so that events see the device at work and not Python. What the host itself takes to issue
the call is measured beside it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from osdn.bench.measure import Call, wall_clock


class Device:
    """The CPU, to try things out: a wall clock, and no counters. `name` is torch's."""

    ROTATED = 1 << 16  # bytes of state to rotate among, so that none is found in a cache
    COPIED = 1 << 20
    MATMUL = 128

    def __init__(self, name: str) -> None:
        self.name = name

    def synchronize(self) -> None:
        """Wait for the device."""

    def clock(self, call: Call) -> tuple[float, float]:
        """Seconds that a call takes on the device, and that the host takes to issue it."""
        seconds = wall_clock(call)
        return seconds, seconds

    def in_a_row(self, calls: Sequence[Call], repeats: int) -> list[float]:
        """Seconds per call where all are issued at once, without the host in between."""

        def all_of_them() -> None:
            for call in calls:
                call()

        return [self.clock(all_of_them)[0] / len(calls) for _ in range(repeats)]

    def peak(self, call: Call) -> int | None:
        """Bytes above what was allocated before, at the worst moment of the call."""
        call()
        return None

    @contextmanager
    def allocated(self) -> Iterator[list[int]]:
        """Holds, afterwards, the bytes that are allocated more than before."""
        yield []

    def kernels(self, call: Call) -> list[tuple[str, float]]:
        """What ran on the device in one call: names and microseconds, the longest first."""
        call()
        return []

    def ceilings(self) -> dict[str, float]:
        """What this device can do: bytes per second of a copy, read and written; FLOP per second of a bf16 product."""
        source = torch.empty(self.COPIED, dtype=torch.uint8, device=self.name).random_()
        target = torch.empty_like(source)
        a, b = (torch.randn(self.MATMUL, self.MATMUL, device=self.name).bfloat16() for _ in range(2))
        c = a @ b
        copy = [self.clock(lambda: target.copy_(source))[0] for _ in range(30)]
        product = [self.clock(lambda: torch.mm(a, b, out=c))[0] for _ in range(30)]
        return {
            "copy_bytes_per_second": 2 * self.COPIED / median(copy[5:]),
            "matmul_flop_per_second": 2 * self.MATMUL**3 / median(product[5:]),
        }


class Cuda(Device):
    """A CUDA device."""

    ROTATED = 1 << 28
    COPIED = 1 << 31
    MATMUL = 8192

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._flush = torch.empty(1 << 30, dtype=torch.uint8, device=name)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def clock(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        ahead = wall_clock(call)
        # A flush takes a fifth of a millisecond at least: enough of them to issue the call behind.
        for _ in range(1 + int(ahead / 2e-4)):
            self._flush.zero_()
        start.record()
        host = wall_clock(call)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, host

    def in_a_row(self, calls: Sequence[Call], repeats: int) -> list[float]:
        """As one CUDA graph."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        return [self.clock(graph.replay)[0] / len(calls) for _ in range(repeats)]

    def peak(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @contextmanager
    def allocated(self) -> Iterator[list[int]]:
        gc.collect()
        torch.cuda.synchronize()
        before, more = torch.cuda.memory_allocated(), list[int]()
        yield more
        torch.cuda.synchronize()
        more.append(torch.cuda.memory_allocated() - before)

    def kernels(self, call: Call) -> list[tuple[str, float]]:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        events: list[Any] = [e for e in profiled.key_averages() if e.device_type == DeviceType.CUDA]
        spent = sorted(((e.key, e.self_device_time_total) for e in events), key=lambda e: -e[1])
        return [(name, round(microseconds, 1)) for name, microseconds in spent if microseconds]
