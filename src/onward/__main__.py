"""`python -m onward`: the command, for launchers that want a module."""

import sys

from onward.cli.main import main

sys.exit(main())
