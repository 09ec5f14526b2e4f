"""Checkpoints: `store` saves and restores them, `files` knows how they lie on disk."""
