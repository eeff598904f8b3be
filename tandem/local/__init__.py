"""A model in this process: the scheduler's core, the workers' engines and the frontend's text side, without sockets.

The only part of `tandem` that sees the inside of the three process packages, which still do not see each other.
"""
