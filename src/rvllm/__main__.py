"""`python -m rvllm` is the command `rvllm`."""

import sys

from rvllm.cli.main import main

sys.exit(main())
