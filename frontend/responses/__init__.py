"""OpenAI's Responses API: items in, items out, and the state between requests."""
