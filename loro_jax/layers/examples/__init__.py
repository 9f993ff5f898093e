"""Worked examples, each a script of a page; they need what they import."""
