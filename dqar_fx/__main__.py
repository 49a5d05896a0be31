"""``python -m dqar_fx``: the same as the command ``dqar-fx``."""

import sys

from dqar_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
