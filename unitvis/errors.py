"""The one exception that users meet."""


class UnitvisError(Exception):
    """Something the user can mend: the message says what is wrong, with the value, and what to do."""


class ImageError(UnitvisError):
    """One image cannot be used; the message is the reason that the manifest lists."""
