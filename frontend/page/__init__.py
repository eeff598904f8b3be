"""The chat page: a folder of static files, and the route that serves them."""
