import sys

from unitvis.cli import main

sys.exit(main())
