"""The commands of ``alit``, a file for each, imported when it is called; ``alit/cli.py`` lists them."""
