"""Trains a low-rank LLaMA, or a RoBERTa on GLUE: one config in, one run directory out.

    python train.py                                       # an embedded corpus, minutes on two cores
    python train.py --config=configs/default.py:paper     # with the paper's settings
    python train.py --config=configs/llama_60m.py --workdir=runs/60m --config.learning_rate=0.005

Run the same command again to resume an interrupted run.
"""

import difflib
import gc
import itertools
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags, logging
from ml_collections import config_flags

_DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs" / "default.py"

# Flags of multi-process runs.
_CLUSTER = ("distributed", "coordinator", "processes", "process", "heartbeat_seconds")


class _UsageError(Exception):
    """Flags that can't be read."""


def main(argv: Sequence[str]) -> int:
    """Trains a model as specified by the flags; returns the exit status.

    Args:
        argv: the flags, without the program's name.

    Returns:
        0 if all steps are done, 1 after an error, which is printed in one line, and 128 + the
        signal's number if a signal stopped the run.

    Example:
        >>> main(["--config.stepz=3"])
        1
    """
    logging.set_verbosity(logging.ERROR)  # hides the libraries' informational messages
    try:
        values = _parse(argv)
    except _UsageError as error:
        print(f"error: {error} (see configs/ and python train.py --help)", file=sys.stderr)
        return 1
    if values.help:
        from loro_jax.training.help import config_help

        print(__doc__, values.get_help(), "", *config_help(), sep="\n")
        return 0
    # Heavy imports come after the flags have been checked.
    from loro_jax.errors import TrainingError
    from loro_jax.training.processes import leave

    try:
        return _run(values, argv)
    except (TrainingError, OSError) as error:  # OSError: from any disk or file system
        print(f"error: {error}", file=sys.stderr)
        return leave(1)


def _run(values: flags.FlagValues, argv: Sequence[str]) -> int:
    from loro_jax.errors import TrainingError
    from loro_jax.planning.dry_run import dry_run
    from loro_jax.training.loop import train
    from loro_jax.training.processes import Cluster, connect

    if values.accelerator and not values.dry_run:
        raise TrainingError(
            f"--accelerator={values.accelerator} is for --dry_run; a run uses the devices it finds."
        )
    # Before JAX's devices are used for the first time.
    if not values.dry_run:
        connect(
            Cluster(
                values.coordinator,
                values.processes,
                values.process,
                values.distributed,
                values.heartbeat_seconds,
            )
        )
    config, name = _config(values)
    if values.dry_run:
        dry_run(config, values.devices, values.accelerator)
        return 0
    command = " ".join(["python train.py", *_flags_to_repeat(argv)])
    return train(config, values.workdir or f"runs/{name}", command).exit_status


def _config(values: flags.FlagValues):
    """Returns the config and the default name of its run; raises TrainingError if invalid."""
    from loro_jax.errors import TrainingError
    from loro_jax.training.config import Config
    from loro_jax.training.method_options import settled

    config_file = config_flags.get_config_filename(values["config"])
    file, *settings = config_file.split(":", 1)  # after the colon: get_config's argument
    path = pathlib.Path(file)
    if not path.is_file():
        raise TrainingError(f"--config={config_file}: there is no such file.")
    config = values.config
    if not isinstance(config, Config):
        raise TrainingError(f"--config={config_file}: get_config() must return a training Config.")
    asked = config_flags.get_override_values(values["config"])
    config = settled(config, asked)
    if config.warmup_steps > config.steps and "warmup_steps" not in asked:
        # The file's warm-up is meant for the file's steps; a shorter run must not fail by it.
        print(
            f"config.warmup_steps = {config.warmup_steps} is longer than config.steps = "
            f"{config.steps}: taken as a tenth of them, {config.short_warmup}"
        )
        config.warmup_steps = config.short_warmup
    return config, "_".join([path.stem, *settings])


def _parse(argv: Sequence[str]) -> flags.FlagValues:
    """Parses the flags; raises _UsageError with a one-line message if they are invalid."""
    # absl expects the program's name first.
    command = ["train.py", *argv]
    try:
        values = _define(command)
        _, *rest = values(command)
    # absl and ml_collections raise all of these for a wrong flag or value.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise _UsageError(_reason(error)) from error
    if rest:
        raise _UsageError(f"unexpected argument {rest[0]!r}; flags look like --config.steps=100.")
    return values


def _define(command: list[str]) -> flags.FlagValues:
    """Defines the flags; this already reads the config with the command's overrides."""
    # Not absl's global flags: main() may run several times in a process.
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        str(_DEFAULT_CONFIG),
        "The run's config file, optionally with a colon and the name of settings (:paper); "
        "override a field with --config.field=value.",
        flag_values=values,
        sys_argv=command,
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Run directory; default: runs/ and the config file's name.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "This is one of several processes, as described in the environment by SLURM, Open MPI, "
        "Kubernetes or a TPU pod.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of the first of several processes, if the environment does not name it.",
        flag_values=values,
    )
    flags.DEFINE_integer("processes", None, "Number of processes.", flag_values=values)
    flags.DEFINE_integer("process", None, "Index of this process, from 0.", flag_values=values)
    flags.DEFINE_integer(
        "heartbeat_seconds",
        60,
        "Seconds without a heartbeat after which another process counts as dead.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Compile the step for simulated devices, print its memory and cost, and exit.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "devices",
        None,
        "Devices of a dry run; default: as in config.mesh.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "accelerator",
        None,
        "Accelerator that a dry run compiles for without having one: h100, h200, a100 (needs "
        "jax[cuda13]), v5p, v5e or v6e (needs jax[tpu]); default: simulated CPUs.",
        flag_values=values,
    )
    flags.DEFINE_bool("help", False, "Print this help.", short_name="h", flag_values=values)
    return values


def _reason(error: Exception) -> str:
    """Returns the message of a flag parser's error in one line."""
    reason = str(error.args[0] if isinstance(error, KeyError) else error)
    if "Error whilst parsing config file" in reason:
        # The message includes a traceback; the error itself is the last line, after its type.
        reason = reason.strip().splitlines()[-1].partition(": ")[2]
    reason = reason.split("\n")[0]
    unknown = re.match(r"Field (\w+) not found", reason)
    return _unknown_field(unknown[1]) if unknown else reason


def _unknown_field(name: str) -> str:
    from loro_jax.training.help import known_fields
    from loro_jax.training.renamed import old_name_message

    renamed = old_name_message(name)
    if renamed is not None:
        return renamed
    known = known_fields()
    if name in known:
        return f"the config has no field {name!r}; it is one of other runs, see --help"
    likely = difflib.get_close_matches(name, known, n=1) + [
        k for k in known if k.endswith(f".{name}")
    ]
    hint = f"; did you mean config.{likely[0]}?" if likely else ""
    return f"the config has no field {name!r}{hint}"


def _flags_to_repeat(arguments: Sequence[str]) -> list[str]:
    """Returns the flags of this call except those that the suggested commands change."""
    changed = ("workdir", "config.method", *_CLUSTER)
    return [
        shlex.quote(argument)
        for before, argument in itertools.pairwise(["", *arguments])
        # A flag's value may be an argument of its own, after the flag.
        if argument.lstrip("-").split("=")[0] not in changed and before.lstrip("-") not in changed
    ]


if __name__ == "__main__":
    # Tracing makes many objects that stay: looking through all of them less often shortens a start.
    gc.set_threshold(50_000, 20, 20)
    sys.exit(main(sys.argv[1:]))
