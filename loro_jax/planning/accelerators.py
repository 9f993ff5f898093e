"""Peak performance of accelerators, from their makers' datasheets."""

from __future__ import annotations

from typing import NamedTuple

from loro_jax.planning.collectives import Collective


class Accelerator(NamedTuple):
    """Peak performance of one device.

    Attributes:
        flops: dense bfloat16 operations per second.
        float32_flops: operations per second in float32 products at JAX's default precision, which
            rounds their operands: to TF32 on a GPU, to bfloat16 on a TPU.
        exact_flops: operations per second in float32 products at the highest precision, without
            tensor cores on a GPU, in six bfloat16 passes on a TPU.
        memory: bytes.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second sent to devices of the same node (TPU: pod) over all links,
            half of the datasheet's figure for both directions.
        network_bandwidth: bytes per second sent to other nodes.
        node: devices per node.
    """

    flops: float
    float32_flops: float
    exact_flops: float
    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    node: int

    def seconds(self, exchange: Collective) -> float:
        """Returns the time of a collective at full bandwidth, within nodes if all groups are."""
        within = all(len({i // self.node for i in group}) == 1 for group in exchange.groups)
        return exchange.sent / (self.link_bandwidth if within else self.network_bandwidth)


# NVIDIA's datasheets of the SXM versions; nodes are DGX systems, with one 400 Gbit/s network card
# per GPU (A100: 200). Google's documentation of the TPUs, whose links between the chips of a pod
# carry 1,200, 400 and 800 GB/s in both directions together; a job stays within a pod.
ACCELERATORS = {
    "h100": Accelerator(989e12, 495e12, 67e12, 80e9, 3.35e12, 450e9, 50e9, 8),
    "h200": Accelerator(989e12, 495e12, 67e12, 141e9, 4.8e12, 450e9, 50e9, 8),
    "a100": Accelerator(312e12, 156e12, 19.5e12, 80e9, 2.039e12, 300e9, 25e9, 8),
    "v5p": Accelerator(459e12, 459e12, 459e12 / 6, 95e9, 2.765e12, 600e9, 600e9, 8960),
    "v5e": Accelerator(197e12, 197e12, 197e12 / 6, 16e9, 0.819e12, 200e9, 200e9, 256),
    "v6e": Accelerator(918e12, 918e12, 918e12 / 6, 32e9, 1.64e12, 400e9, 400e9, 256),
}

# JAX's names of TPUs that do not contain the name above.
_TPUS = {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """Returns the datasheet of a device by JAX's name of it; None if unknown.

    Args:
        device_kind: ``jax.devices()[0].device_kind``.

    Example:
        >>> accelerator_of("NVIDIA H100 80GB HBM3").flops
        989000000000000.0
        >>> accelerator_of("TPU v5 lite").flops
        197000000000000.0
        >>> accelerator_of("cpu") is None
        True
    """
    words = _TPUS.get(device_kind, device_kind).lower().replace("-", " ").split()
    return next((ACCELERATORS[name] for name in ACCELERATORS if name in words), None)
