"""The methods that LORO is compared with; each file describes its method and names the source."""

from loro_jax.peers.adalora import adalora
from loro_jax.peers.adarankgrad import adarankgrad
from loro_jax.peers.coso import coso
from loro_jax.peers.dct_adamw import dct_adamw
from loro_jax.peers.fira import fira
from loro_jax.peers.frugal import frugal
from loro_jax.peers.galore import galore
from loro_jax.peers.gradnormlorp import gradnormlorp
from loro_jax.peers.increlora import increlora
from loro_jax.peers.lift import lift, scale_by_lift
from loro_jax.peers.lora_plus import lora_plus
from loro_jax.peers.muon import muon, scale_by_muon
from loro_jax.peers.preconditioned import preconditioned, scale_by_preconditioner
from loro_jax.peers.relora import jagged_schedule, merge_and_restart
from loro_jax.peers.restarts import lowrank_restarts, svd_projection
from loro_jax.peers.soft_threshold import codyra, soft_threshold, sora
from loro_jax.peers.spectron import spectron
from loro_jax.peers.switchlora import switch
from loro_jax.peers.trion import scale_by_trion, trion
from loro_jax.peers.trp import trp

__all__ = [
    "adalora",
    "adarankgrad",
    "codyra",
    "coso",
    "dct_adamw",
    "fira",
    "frugal",
    "galore",
    "gradnormlorp",
    "increlora",
    "jagged_schedule",
    "lift",
    "lora_plus",
    "lowrank_restarts",
    "merge_and_restart",
    "muon",
    "preconditioned",
    "scale_by_lift",
    "scale_by_muon",
    "scale_by_preconditioner",
    "scale_by_trion",
    "soft_threshold",
    "sora",
    "spectron",
    "svd_projection",
    "switch",
    "trion",
    "trp",
]
