"""`python -m dl_jax.watch WORKDIR`: see `dl_jax.harness.watch.command`."""

import sys

from dl_jax.harness.watch.command import main

if __name__ == "__main__":
    sys.exit(main())
