"""One module for each command of `tandem`; tandem/cli.py has their table."""
