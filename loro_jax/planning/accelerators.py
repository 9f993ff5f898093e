"""Peak performance of accelerators, from their makers' datasheets."""

from __future__ import annotations

from typing import NamedTuple

from loro_jax.planning.collectives import Collective


class Accelerator(NamedTuple):
    """Peak performance of one device.

    Attributes:
        flops: dense bfloat16 operations per second.
        memory: bytes.
        memory_bandwidth: bytes per second.
        link_bandwidth: bytes per second sent to devices of the same node (TPU: pod), half of the
            datasheet's figure for both directions.
        network_bandwidth: bytes per second sent to other nodes.
        node: devices per node.
    """

    flops: float
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
# per GPU (A100: 200). Google's documentation of TPU v5p: 4,800 Gbit/s between chips of a pod.
ACCELERATORS = {
    "h100": Accelerator(989e12, 80e9, 3.35e12, 450e9, 50e9, 8),
    "h200": Accelerator(989e12, 141e9, 4.8e12, 450e9, 50e9, 8),
    "a100": Accelerator(312e12, 80e9, 2.039e12, 300e9, 25e9, 8),
    "tpu_v5p": Accelerator(459e12, 95e9, 2.765e12, 300e9, 300e9, 8960),
}


def accelerator_of(device_kind: str) -> Accelerator | None:
    """Returns the datasheet of a device by JAX's name of it; None if unknown.

    Args:
        device_kind: ``jax.devices()[0].device_kind``.

    Example:
        >>> accelerator_of("NVIDIA H100 80GB HBM3").flops
        989000000000000.0
        >>> accelerator_of("cpu") is None
        True
    """
    words = device_kind.lower().replace("-", " ").split()
    # JAX calls a TPU v5p "TPU v5" or "TPU v5p".
    found = {"tpu_v5p"} if words[:2] in (["tpu", "v5"], ["tpu", "v5p"]) else set(words)
    return next((ACCELERATORS[name] for name in ACCELERATORS if name in found), None)
