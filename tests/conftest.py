"""Where there is no GPU, the tests of KERNELS run them in Triton's interpreter, on CPU tensors.

The interpreter is chosen when triton, and whatever defines a kernel, is imported: hence here, before any test can. It
is not left chosen, or backend="auto" would take it in all other tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

KERNELS = {"test_triton.py", "test_conv_kernels.py"}
ON_CPU = {"TRITON_INTERPRET": "1"}

interpreted = importlib.util.find_spec("triton") is not None and not torch.cuda.is_available()
if interpreted:
    with patch.dict(os.environ, ON_CPU):
        importlib.import_module("osdn.ops.triton.function")
        importlib.import_module("osdn.ops.triton.recurrent")
        importlib.import_module("osdn.ops.triton.conv")
        language = importlib.import_module("triton.language.core")
        runtime = importlib.import_module("triton.runtime.interpreter")

    # Each call of a helper looks through all of the language for what is to be interpreted: a third of the time.
    found = {}

    def getmembers(package):
        if package not in found:
            found[package] = [name for name, x in inspect.getmembers(package) if language.is_builtin(x)]
        return [(name, getattr(package, name)) for name in found[package]]

    runtime.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": getmembers})

    # Triton 3.6 takes an index from an array of one as int() does, which NumPy 2.4 refuses.
    patch_tensor = runtime._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    runtime._patch_lang_tensor = patch_tensor_and_index


def chosen(path):
    return patch.dict(os.environ, ON_CPU) if interpreted and path.name in KERNELS else nullcontext()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with chosen(collector.path):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with chosen(item.path):
        return (yield)
