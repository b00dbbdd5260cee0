"""python -m unitvis: the command line, also as torchrun starts it."""

import os
import sys

from unitvis.cli.main import main
from unitvis.scanning.torchrun import processes

code = main()
if processes() > 1:
    # Threads of PyTorch's process group can outlive it and abort the interpreter while it shuts down (seen: SIGABRT,
    # "terminate called without an active exception"), upon which torchrun kills the processes that still work.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
