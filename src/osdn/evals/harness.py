"""lm-evaluation-harness on a checkpoint of this library, from here or by its own command."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import tempfile
from pathlib import Path

from osdn.data.tokenizer import byte_tokenizer, has_tokenizer
from osdn.evals.checkpoint import Checkpoint
from osdn.models.checkpoint import is_preconditioned, read_config
from osdn.runs import RunError
from osdn.runs.store import write_atomic, write_json

_MODULE = "osdn_auto"
_SOURCE = '''"""Lets transformers load the model of this directory with trust_remote_code=True.

The code itself is the package osdn, which has to be installed.
"""

import osdn


class OSDNConfig(osdn.OSDNConfig):
    pass


class OSDNForCausalLM(osdn.OSDNForCausalLM):
    config_class = OSDNConfig
'''


def run_harness(path: Path, arguments: str) -> None:
    """`lm_eval run --model hf --model_args pretrained=<path>` with `arguments` behind it, as a shell splits them.

    A prompt that the harness would truncate ends the run, since a score of half a prompt says nothing.

    Raises ValueError for a checkpoint that is none or that the harness cannot load, or without the harness, and
    RunError for a truncated prompt.
    """
    Checkpoint.open(path)
    if is_preconditioned(read_config(path)):
        takes = "takes tasks of `osdn eval`"
        raise ValueError(f"harness: got {path}, a hybrid that it would load without its preconditioner; {takes}")
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise ValueError("harness: lm-evaluation-harness is missing; takes `pip install 'osdn[eval]'`") from None
    model = [f"pretrained={path}", "backend=causal"]
    watched, refuse = logging.getLogger("lm_eval.models.huggingface"), _RefuseTruncation()
    watched.setLevel(logging.WARNING)  # whatever LMEVAL_LOG_LEVEL says
    watched.addFilter(refuse)
    before = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        if not has_tokenizer(path):
            byte_tokenizer().save_pretrained(folder)
            model.append(f"tokenizer={folder}")
        try:
            sys.argv = ["lm_eval", "run", "--model", "hf", "--model_args", *model, *shlex.split(arguments)]
            cli_evaluate()
        finally:
            sys.argv = before
            watched.removeFilter(refuse)


def export_auto_map(path: Path) -> list[str]:
    """Write a module of a few lines beside the weights, `auto_map` into the config, and the tokenizer of bytes where
    there is none, so that `lm_eval --model hf --model_args pretrained=<path>,trust_remote_code=True` finds everything.

    Returns the names of the files written. Raises ValueError for a checkpoint of another kind, RunError where the
    directory cannot be written.
    """
    checkpoint = Checkpoint.open(path)
    if checkpoint.config.model_type != "osdn":
        raise ValueError(f"checkpoint: got {path} of type {checkpoint.config.model_type!r}, takes one of type 'osdn'")
    config = json.loads((path / "config.json").read_bytes())
    config["auto_map"] = {
        "AutoConfig": f"{_MODULE}.OSDNConfig",
        "AutoModelForCausalLM": f"{_MODULE}.OSDNForCausalLM",
    }
    written = [f"{_MODULE}.py"]
    write_atomic(path / written[0], _SOURCE.encode())
    if not has_tokenizer(path):
        written += (Path(file).name for file in byte_tokenizer().save_pretrained(path))
    write_json(path / "config.json", config)
    return [*written, "config.json"]


class _RefuseTruncation(logging.Filter):
    """The harness truncates prompts with a warning."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "truncat" in record.getMessage().lower():
            raise RunError(f"harness: {record.getMessage()} Takes --model_args max_length=N for longer prompts.")
        return True
