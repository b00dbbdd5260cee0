"""The command line's entry: arguments in, exit code out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from unitvis.cli.codes import USAGE
from unitvis.cli.options import parsed
from unitvis.cli.output import unfailing_output
from unitvis.errors import Interrupted, UnitvisError, printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; a UnitvisError is printed as one line on stderr, without a traceback."""
    arguments = parsed(sys.argv[1:] if argv is None else argv)
    from unitvis.cli.commands import COMMANDS  # imports PyTorch, which help and wrong usage need not wait for

    with unfailing_output(), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _complain(f"warning: {message}")
        try:
            return COMMANDS[arguments.command](arguments)
        except UnitvisError as error:
            _complain(str(error))
            return USAGE
        except OSError as error:  # a disk, a folder or a name that the system refuses
            _complain(str(error))
            return USAGE
        except Interrupted as error:
            _complain(str(error))
            return error.code
        except KeyboardInterrupt:
            _complain("interrupted")
            return 130


def _complain(message: str) -> None:
    """Print a message as one line on stderr."""
    print(f"unitvis: {printable(message)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
