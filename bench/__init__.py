"""Measuring scripts: loads, an HTTP client that plays them, raw ceilings and comparisons with other servers."""
