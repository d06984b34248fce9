"""Benchmarks: scripts with fixed seeds that write JSON; see README.md."""
