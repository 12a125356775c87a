"""The tests of this folder need the null CUDA: ``make host-check`` runs them, ``pytest benchmarks`` does not."""

collect_ignore_glob = ["test_*.py"]
