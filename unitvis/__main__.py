import sys

from unitvis.cli.main import main

sys.exit(main())
