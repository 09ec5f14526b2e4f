"""What an experiment needs of the machinery that launches and records it."""

from dl_jax.harness.launch import launch
from dl_jax.harness.results.claims import Claim
from dl_jax.harness.run import Run

__all__ = ["Claim", "Run", "launch"]
