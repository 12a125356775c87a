"""Benchmarks: every contender is verified before it is timed, and all of them take turns in one run."""
