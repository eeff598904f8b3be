"""Images and sounds of a request: fetched, decoded, checked and turned into what a model takes."""
