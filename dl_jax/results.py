"""`python -m dl_jax.results`: see `dl_jax.harness.results.page`."""

import sys

from dl_jax.harness.results.page import main

if __name__ == "__main__":
    sys.exit(main())
