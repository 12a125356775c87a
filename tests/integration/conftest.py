"""``make integration`` installs other people's packages and sets ALIT_INTEGRATION; else nothing here is collected."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("ALIT_INTEGRATION") else ["test_*.py"]
