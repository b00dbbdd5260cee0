"""python -m unitvis: the command line, also as torchrun starts it."""

import os
import sys

from unitvis.cli.main import main

code = main()
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started this process
    # Threads of PyTorch's process group can outlive it and abort the interpreter while it shuts down (seen: SIGABRT,
    # "terminate called without an active exception"), upon which torchrun kills the processes that still work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
