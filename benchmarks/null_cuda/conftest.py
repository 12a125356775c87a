"""Leave the tests of this folder to ``make host-check``, which runs them with the null CUDA."""

collect_ignore_glob = ["test_*.py"]
