"""Images and sounds of a request: decoded, checked and turned into what a model takes."""
