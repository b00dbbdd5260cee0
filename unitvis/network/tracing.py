"""One trace at a time: while torch.fx traces, it replaces methods of `nn.Module` for all threads of the process."""

from __future__ import annotations

import threading

TRACING = threading.Lock()  # held by whoever traces
