"""Media that requests point to: fetched here, decoded elsewhere."""
