"""The methods that LORO is compared with; each file describes its method and names the source."""

from loro_jax.peers.adarankgrad import adarankgrad
from loro_jax.peers.fira import fira
from loro_jax.peers.galore import galore
from loro_jax.peers.gradnormlorp import gradnormlorp
from loro_jax.peers.muon import muon, scale_by_muon
from loro_jax.peers.preconditioned import preconditioned, scale_by_preconditioner
from loro_jax.peers.relora import jagged_schedule, merge_and_restart
from loro_jax.peers.restarts import lowrank_restarts, svd_projection
from loro_jax.peers.spectron import spectron
from loro_jax.peers.switchlora import switch

__all__ = [
    "adarankgrad",
    "fira",
    "galore",
    "gradnormlorp",
    "jagged_schedule",
    "lowrank_restarts",
    "merge_and_restart",
    "muon",
    "preconditioned",
    "scale_by_muon",
    "scale_by_preconditioner",
    "spectron",
    "svd_projection",
    "switch",
]
