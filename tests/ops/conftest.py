"""Which tests of Triton kernels a process has: their values where it has Triton's interpreter, the others elsewhere."""

import os

collect_ignore_glob = ["test_*triton.py"] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
