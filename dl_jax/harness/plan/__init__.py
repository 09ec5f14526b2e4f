"""What an experiment would cost on a TPU slice that is not there."""
