"""`python -m depict_hf`: the command `depict`, also for launchers such as `accelerate launch -m depict_hf ...`."""

import sys

from .cli import main

sys.exit(main())
