"""Drawing winners: patches, tiles, sheets and notebook cells."""

from unitvis.drawing.display import tell_of_missing_displays

tell_of_missing_displays()
