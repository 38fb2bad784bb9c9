"""`python -m geneformer_hf`, which is how launchers of several processes start the command line."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
