"""Reading checkpoints whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from osdn.models.hybrid import FIELD, load_preconditioned
from osdn.models.modeling import OSDNForCausalLM
from osdn.runs import RunError, first_line


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint's directory; ValueError where there is no directory, or no checkpoint in it."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {what}, takes the directory of a checkpoint")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not a checkpoint, there is no config.json in it") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'config.json'}: cannot be read ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path / 'config.json'}: not a model's, it names no model_type")
    return config


def is_preconditioned(config: dict[str, Any]) -> bool:
    """Whether config.json is of a model saved after `osdn.precondition_model`."""
    return FIELD in config or FIELD in (config.get("text_config") or {})


def load_model(path: Path, *, dtype: str = "auto", any_kind: bool = False) -> PreTrainedModel:
    """An OSDN model or a preconditioned hybrid, or with `any_kind` any causal language model that transformers knows,
    ready for inference; "auto" is the dtype of its weights.

    Raises ValueError where the directory holds none, RunError where weights are missing, damaged or do not fit.
    """
    config = read_config(path)
    if config["model_type"] == "osdn":
        return load_whole(OSDNForCausalLM.from_pretrained, path, dtype=dtype)
    if is_preconditioned(config):
        return load_whole(load_preconditioned, path, dtype=dtype)
    if any_kind:  # may have weights beside the language model's
        return load_whole(AutoModelForCausalLM.from_pretrained, path, dtype=dtype, extra=True)
    raise ValueError(f"{path}: got a model of type {config['model_type']}, takes an OSDN one (see osdn convert)")


def load_whole(
    load: Callable[..., Any], path: Path, *, dtype: str = "auto", extra: bool = False, **options: Any
) -> PreTrainedModel:
    """`load(path, **options)`, a `from_pretrained`, where every weight is there and fits, and with `extra` there may
    be others; transformers alone would only warn."""
    with quiet():
        try:
            model, info = load(
                path,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
        except Exception as error:  # whatever damaged or foreign files lead it to
            if isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                raise
            raise RunError(f"{path}: weights cannot be read ({first_line(error)})") from error
    problems = [f"{key} is {tuple(got)}, takes {tuple(takes)}" for key, got, takes in sorted(info["mismatched_keys"])]
    problems += [f"{key} is missing" for key in sorted(info["missing_keys"])]
    problems += [f"{key} is unknown" for key in sorted(info["unexpected_keys"]) if not extra]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise RunError(f"{path}: the weights are not those of {type(model).__name__}: {problems[0]}{more}")
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports of what is checked here anyway."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
