"""Pretrains a low-rank LLaMA: one config in, one run directory out.

    python train.py                                       # an embedded corpus, minutes on two cores
    python train.py --config=configs/default.py:paper     # with the paper's settings
    python train.py --config=configs/llama_60m.py --workdir=runs/60m --config.learning_rate=0.005

The same command again continues an interrupted run.
"""

import difflib
import itertools
import pathlib
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

_DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs" / "default.py"


def _or_exit(parse: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a flag parser; one line and an exit where it would print a traceback."""
    try:
        return parse(*arguments)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        reason = str(error.args[0] if isinstance(error, KeyError) else error)
        if "Error whilst parsing config file" in reason:
            # It comes with its traceback: what it says is the last line, behind its type.
            reason = reason.strip().splitlines()[-1].partition(": ")[2]
        reason = reason.split("\n")[0]
        unknown = re.match(r"Field (\w+) not found", reason)
        if unknown:
            reason = _unknown_field(unknown[1])
        print(f"error: {reason} (see configs/ and python train.py --help)", file=sys.stderr)
        sys.exit(1)


def _unknown_field(name: str) -> str:
    from loro_jax.training.config import field_names
    from loro_jax.training.renamed import told

    renamed = told(name)
    if renamed is not None:
        return renamed
    known = field_names()
    likely = difflib.get_close_matches(name, known, n=1) + [
        k for k in known if k.endswith(f".{name}")
    ]
    hint = f"; did you mean config.{likely[0]}?" if likely else ""
    return f"the config has no field {name!r}{hint}"


# Overrides on the command line are read at the definition already.
_CONFIG = _or_exit(
    config_flags.DEFINE_config_file,
    "config",
    str(_DEFAULT_CONFIG),
    "The run's config file, with settings behind a colon where it has several (:paper); override a "
    "field with --config.field=value.",
)

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; default: runs/ and the config file's name."
)

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes, as SLURM, Open MPI, Kubernetes or a TPU pod say in the environment.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes, where nothing else says so."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this one, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "Silence after which another process is taken for dead."
)


_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Compile the step for simulated devices, print what it takes, and end."
)
_DEVICES = flags.DEFINE_integer(
    "devices", None, "Devices of a dry run; default: as config.mesh says.", lower_bound=1
)


def _parse_or_help(argv: list[str]) -> list[str]:
    """Parses the flags; prints all flags and all fields of the config, and ends, if asked to."""
    if {"--help", "-help", "-h"} & set(argv[1:]):
        from loro_jax.training.help import config_help

        print(__doc__ + flags.FLAGS.main_module_help(), "", *config_help(), sep="\n")
        sys.exit(0)
    return _or_exit(flags.FLAGS, argv)


# Flags that say which of several processes this one is.
_CLUSTER = ("distributed", "coordinator", "processes", "process", "heartbeat_seconds")


def _flags_to_repeat(arguments: list[str]) -> list[str]:
    """The flags of this call but for those that a comparison changes."""
    changed = ("workdir", "config.method", *_CLUSTER)
    return [
        shlex.quote(argument)
        for before, argument in itertools.pairwise(["", *arguments])
        if argument.lstrip("-").split("=")[0] not in changed and before.lstrip("-") not in changed
    ]


def main(argv: list[str]) -> int:
    """Trains, and returns the exit status."""
    logging.set_verbosity(logging.ERROR)  # libraries log what is of no use to a run
    # Heavy imports wait until the flags are known to be good.
    from loro_jax.errors import TrainingError
    from loro_jax.planning.dry_run import dry_run
    from loro_jax.training.config import Config
    from loro_jax.training.loop import train
    from loro_jax.training.methods import settled
    from loro_jax.training.processes import Cluster, connect, leave

    try:
        if not _DRY_RUN.value:
            connect(
                Cluster(
                    _COORDINATOR.value,
                    _PROCESSES.value,
                    _PROCESS.value,
                    _DISTRIBUTED.value,
                    _HEARTBEAT.value,
                )
            )
        if len(argv) > 1:
            raise TrainingError(
                f"unexpected argument {argv[1]!r}; flags look like --config.steps=100."
            )
        config_file = config_flags.get_config_filename(flags.FLAGS["config"])
        file, *settings = config_file.split(":", 1)  # behind the colon: get_config's argument
        path = pathlib.Path(file)
        if not path.is_file():
            raise TrainingError(f"--config={config_file}: there is no such file.")
        config = _CONFIG.value
        if not isinstance(config, Config):
            raise TrainingError(
                f"--config={config_file}: get_config() must return a training Config."
            )
        asked = config_flags.get_override_values(flags.FLAGS["config"])
        config = settled(config, asked)
        if config.warmup_steps > config.steps and "warmup_steps" not in asked:
            # The file's warm-up is for the file's steps; a look at fewer must not fail for it.
            print(
                f"config.warmup_steps = {config.warmup_steps} is longer than config.steps = "
                f"{config.steps}: taken as a tenth of them, {config.short_warmup}"
            )
            config.warmup_steps = config.short_warmup
        if _DRY_RUN.value:
            dry_run(config, _DEVICES.value)
            return 0
        name = "_".join([path.stem, *settings])
        command = " ".join(["python train.py", *_flags_to_repeat(sys.argv[1:])])
        return train(config, _WORKDIR.value or f"runs/{name}", command).exit_status
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(1)
    except OSError as error:  # a disk or a file system, wherever it was met
        print(f"error: {error}", file=sys.stderr)
        return leave(1)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_or_help)
