"""The `osdn` command. Every subcommand is a typed config; what it runs is imported when it runs."""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import tyro

from osdn.bench.__main__ import Config as Bench
from osdn.compare.config import Experiment
from osdn.convert import Convert
from osdn.diagnostics.config import Diagnose
from osdn.evals.config import Evaluation
from osdn.generate import Generate
from osdn.recipes import RECIPES
from osdn.runs import RunError
from osdn.theory.config import Theory
from osdn.train.config import TrainConfig

if TYPE_CHECKING:
    Recipe = TrainConfig
else:
    Recipe = tyro.conf.OmitArgPrefixes[
        tyro.extras.subcommand_type_from_defaults(
            {name: recipe() for name, recipe in RECIPES.items()},
            descriptions={name: recipe.__doc__ for name, recipe in RECIPES.items()},
            prefix_names=False,
        )
    ]


@dataclass(frozen=True)
class Compare:
    """Train models that differ in the mixer alone, from the same seeds on the same data: does preconditioning pay?

    A run that was stopped goes on with the same command; a finished one prints its table again."""

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    full: bool = False
    """Train 1,200 steps of 64 sequences."""
    grid: bool = False
    """Every rule and every control, pairs listed once and twice, tests at longer lengths, 5 seeds: can the gain be
    credited to the online preconditioner?"""
    baselines: tuple[str, ...] = ()
    """Models that the others are compared with, seed by seed; by default the first, in the grid all controls."""
    out: Path | None = None
    """Run directory; by default runs/<task>-<hash of the config>, or runs/grid."""
    workers: int = 2
    """Processes of one thread each; 0 or 1 trains in this one."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    goes_on: ClassVar = True

    def run(self) -> None:
        from osdn.compare import compare, grid

        self.experiment.refuse_idle()
        experiment = self.experiment.full() if self.full else self.experiment
        (grid if self.grid else compare)(
            experiment,
            out=self.out,
            workers=self.workers,
            checkpoint_every=self.checkpoint_every,
            baselines=self.baselines,
        )


@dataclass(frozen=True)
class Train:
    """Train a language model on text by a recipe, whose every field can be overridden.

    A run that was stopped, in whatever way, goes on with the same command. On several GPUs: torchrun --nproc-per-node 8
    -m osdn.cli train RECIPE."""

    recipe: Recipe
    goes_on: ClassVar = True

    def run(self) -> None:
        from osdn.train import train

        train(self.recipe)


class Command(Protocol):
    """A subcommand's config. Where it has a true `goes_on`, the same command goes on with what was interrupted."""

    def run(self) -> None:
        """Raises ValueError or RunError for a request that cannot be met."""


SUBCOMMANDS: dict[str, Callable[..., Command]] = {
    "compare": Compare,
    "diagnose": Diagnose,
    "theory": Theory,
    "train": Train,
    "convert": Convert,
    "generate": Generate,
    "eval": Evaluation,
    "bench": Bench,
}


_MANY = {
    f"--{option.name.replace('_', '-')}"
    for kind in (Bench, Compare, Diagnose, Evaluation, Experiment, Generate, Theory, TrainConfig)
    for option in fields(kind)
    if str(option.type).endswith("...]")
}
"""Options that take any number of values."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 nobody reads on or no space is left, 2 a request that cannot be met (one line on stderr),
    130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--harness" in arguments:  # what stands behind it is another program's
        at = arguments.index("--harness")
        arguments = [*arguments[:at], f"--harness={shlex.join(arguments[at + 1 :])}"]
    command: Command | None = None
    try:
        names = [name.partition("=")[0].replace("_", "-") for name in arguments]
        for name in sorted(_MANY & set(names)):
            if (count := names.count(name)) > 1:  # of all but the last the values would be lost
                raise ValueError(f"{name}: got it {count} times, takes all its values behind one")
        name = "arguments"
        for argument in arguments:
            if option := re.match("--[^=]+", argument):
                name = option[0]
            if argument in ("", f"{name}=") and name != "--prompt":  # an empty path would be the current directory
                raise ValueError(f"{name}: got '', takes no empty value")
        if arguments == ["--version"]:
            print(f"osdn {version('osdn')}", flush=True)
            return 0
        command = tyro.extras.subcommand_cli_from_dict(
            SUBCOMMANDS,
            prog="osdn",
            description="Online Scaled DeltaNet: linear attention with a preconditioner learned online.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoints" if getattr(command, "goes_on", False) else ""
        print(f"osdn: interrupted{hint}", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at exit
        if error.errno == errno.ENOSPC:  # and not that who reads has had enough, as `head`
            print(f"osdn: {error}", file=sys.stderr)
        return 1
    except (ValueError, RunError) as error:
        print(f"osdn: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
