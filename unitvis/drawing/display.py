"""Where there is no display, `show()` of a picture says so; Pillow does nothing then, or starts what cannot show it."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from PIL import Image, ImageShow

_DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")  # variables of the environment, one of which names a display


class _NoDisplay(ImageShow.Viewer):
    """Says what to do instead of showing a picture; takes none where there is a display."""

    def show(self, image: Image.Image, **options: Any) -> int:
        if sys.platform != "linux" or any(os.environ.get(name) for name in _DISPLAYS):
            return 0  # Pillow asks the next viewer
        warnings.warn(
            "there is no display to show a picture on; save it (picture.save('picture.png')), or end a notebook's cell "
            "with it",
            stacklevel=4,
        )
        return 1


def tell_of_missing_displays() -> None:
    """Make `show()` of every picture warn, on Linux without a display, that it shows nothing."""
    ImageShow.register(_NoDisplay(), 0)  # before those that start programs
