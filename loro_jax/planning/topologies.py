"""Accelerators that are not here, to compile programs for.

The compilers for NVIDIA's GPUs and for TPUs are Python packages that need no device: a program
lowered for the devices of a topology is compiled as it would be there, with the same kernels and
collectives. Products are not tuned, because tuning would have to run them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from loro_jax.errors import TrainingError
from loro_jax.planning.accelerators import ACCELERATORS

# XLA's descriptions of GPUs: (cores, arithmetic units a core, bytes of shared memory a core, bytes
# of it a block can have, bytes per second, bytes of cache, GHz, bytes of memory, major compute
# capability, name).
_GPUS = {
    "h100": (132, 128, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072, 9, "H100 80GB"),
    "h200": (132, 128, 233472, 232448, 4800000000000, 52428800, 1.98, 150121545728, 9, "H200"),
    "a100": (108, 64, 167936, 166912, 2039000000000, 41943040, 1.41, 84987740160, 8, "A100 80GB"),
}
_GPUS_PER_NODE = 8

# Smallest topology of whole hosts' chips, or of one chip.
TPUS: dict[str, tuple[int, ...]] = {"v5p": (2, 2, 1), "v5e": (1, 1), "v6e": (1, 1)}

# libtpu asks for no TPU of this machine, locks none, and writes no log files. Without the last two
# it complains about their absence.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}

# What to install: the package that has the compiler, and how it is asked for.
_CUDA = (("jax-cuda13-pjrt", "jax-cuda12-pjrt"), "pip install 'jax[cuda13]'")
_TPU = (("libtpu",), "pip install 'jax[tpu]'")

NAMES = (*_GPUS, *TPUS)

# Tuning needs the device. Untuned, Triton's kernels are no better than cuBLAS', and take longer to
# compile.
_GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_triton_gemm": False,
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
        devices: devices to make a mesh of.
        compiler_options: arguments of ``lowered.compile``.
    """

    devices: Sequence[jax.Device]
    compiler_options: dict[str, str | bool]


def missing(name: str) -> str | None:
    """Returns how to install the compiler for an accelerator; None if it is installed.

    Args:
        name: one of :data:`NAMES`.
    """
    packages, command = _CUDA if name in _GPUS else _TPU
    return None if any(map(_is_installed, packages)) else command


def make_target(name: str, count: int) -> Target:
    """Returns devices of an accelerator that is not here; call it before JAX is initialised.

    Args:
        name: one of :data:`NAMES`.
        count: number of devices.

    Returns:
        The devices, the first ones of the smallest topology that has as many.

    Raises:
        TrainingError: for an unknown name, without the accelerator's compiler, or for more chips
            than a TPU's pod has.
    """
    if name not in NAMES:
        raise TrainingError(f"--accelerator={name}: expected one of {', '.join(NAMES)}.")
    command = missing(name)
    if command is not None:
        raise TrainingError(f"--accelerator={name}: its compiler is not installed; {command}.")
    if name in TPUS and count > ACCELERATORS[name].node:
        raise TrainingError(
            f"--accelerator={name}: a pod has {ACCELERATORS[name].node} chips, not {count}."
        )
    # Everything but the step itself stays on the CPU, and no device that is here is touched.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = _gpus(name, count) if name in _GPUS else _tpus(name, count)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(f"--accelerator={name}: no {count} devices: {reason}") from error
    return Target(found.devices[:count], _options() if name in _GPUS else {})


def compile_for(target: Target, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compiles a program that was lowered for a target's devices.

    Args:
        target: the devices.
        lowered: the program.

    Returns:
        The compiled program, which can't be run, and its text.

    Raises:
        TrainingError: if the compiler rejects the program; a TPU's does if it needs more memory
            than there is.
    """
    try:
        with _without_cache():
            compiled = lowered.compile(compiler_options=target.compiler_options)
        return compiled, compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        # JAX can't read what a much newer compiler writes.
        hint = " (is it the one for this JAX?)" if reason.startswith("INTERNAL") else ""
        raise TrainingError(
            f"the accelerator's compiler fails on the step: {reason}{hint}"
        ) from error


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Returns a context without JAX's cache of programs, which would load them on a device."""
    config: Any = jax.config
    enabled = config.jax_enable_compilation_cache
    config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # otherwise JAX remembers whether it was enabled
    try:
        yield
    finally:
        config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _gpus(name: str, count: int) -> topologies.TopologyDescription:
    hosts = math.ceil(count / _GPUS_PER_NODE)
    return topologies.get_topology_desc(
        name,
        platform="cuda",
        topology=f"1x{hosts}x{min(count, _GPUS_PER_NODE)}",
        target_config=_target_config(name),
    )


def _tpus(name: str, count: int) -> topologies.TopologyDescription:
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(topology_of(name, count), platform="tpu")


def topology_of(name: str, count: int) -> str:
    """Returns the name of the smallest topology of a TPU with that many chips.

    Example:
        >>> [topology_of("v5p", n) for n in (1, 5, 64)], topology_of("v5e", 8)
        (['v5p:2x2x1', 'v5p:2x2x2', 'v5p:4x4x4'], 'v5e:2x4')
    """
    sizes = list(TPUS[name])
    while math.prod(sizes) < count:
        sizes[sizes.index(min(sizes))] *= 2
        sizes.sort()
    return f"{name}:{'x'.join(map(str, sizes))}"


def _options() -> dict[str, str | bool]:
    """Returns the compiler's options, but those that the environment sets."""
    given = os.environ.get("XLA_FLAGS", "")
    return {option: value for option, value in _GPU_OPTIONS.items() if option not in given}


def _target_config(name: str) -> str:
    cores, units, shared, block, bandwidth, cache, clock, memory, major, full_name = _GPUS[name]
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
        shared_memory_per_block: 49152 shared_memory_per_core: {shared}
        shared_memory_per_block_optin: {block}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {cache}
        cuda_compute_capability {{ major: {major} minor: 0 }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
    device_description_str: "NVIDIA {full_name}"
    """


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
