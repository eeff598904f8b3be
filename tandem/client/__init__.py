"""A typed client of a running server: plain chat and completions, and what only Tandem's servers have.

    from tandem import Client

    with Client() as client:
        answer = client.chat([{"role": "user", "content": "Hello"}], max_tokens=64)
        print(answer.text, answer.stats.tokens_per_s)

For the rest of OpenAI's and Anthropic's APIs their own SDKs work with the server.
"""

from tandem.client.asynchronous import AsyncClient
from tandem.client.synchronous import Client

__all__ = ["AsyncClient", "Client"]
