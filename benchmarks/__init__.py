"""Benchmarks and analysis that run from a source tree; nothing here is installed."""
