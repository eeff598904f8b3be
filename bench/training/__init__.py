"""Training of drafters for a target from the target's own generations: `python -m bench.train_drafter`."""
