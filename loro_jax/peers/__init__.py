"""Peer methods that LORO is compared with, on the same trees of (B, A) pairs."""
