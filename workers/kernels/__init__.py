"""Attention kernels behind `cache.attend`: ragged decode and verify over slots or blocks."""
