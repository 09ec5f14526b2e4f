"""What a run's folder shows: its curves, its verdicts, and how it differs from another run."""
