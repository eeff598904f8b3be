"""Drafters: their checkpoints, forward passes and context caches.

A feature drafter has two parts. `fusion` runs in the target process and turns captured hidden states into the rows that
are sent; `base.Drafter` runs in the drafter process, keeps one context state per sequence and proposes tokens.
`registry.load_fusion` and `registry.load_drafter` make both from what `checkpoint.detect` says about a folder.
"""
