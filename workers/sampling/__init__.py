"""Drawing tokens: per row, vectorised, and keyed by (seed, position) so that a result never depends on the batch."""
