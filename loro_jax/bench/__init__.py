"""Benchmarks: ``python -m loro_jax bench NAME``.

Every benchmark times its candidates in turns (A B A B ...) within one run and reports medians and
ratios, because machines are noisy and absolute times do not transfer between machines.
"""
