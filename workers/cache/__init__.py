"""Slots with per-row offsets: where each layer's keys, values and recurrent states live."""
