"""``python -m llmfast`` is the command ``llmfast``."""

import sys

from llmfast.cli import main

sys.exit(main())
