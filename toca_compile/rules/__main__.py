"""``python -m toca_compile.rules [MODEL]`` is ``toca-compile rules [MODEL]``."""

import sys

from toca_compile.cli import main

sys.exit(main(["rules", *sys.argv[1:]]))
