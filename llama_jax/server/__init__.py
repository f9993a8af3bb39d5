"""An HTTP server on one engine, for the clients of OpenAI and Anthropic (docs/server.md).

From a socket inwards: `connections` (slow and stalled clients), `guard` (who may ask, and how much), `app` (routes),
`apis` (other APIs into OpenAI's and back), `asking` (bodies into engine requests), `answering` (answers and chunks).
Nothing here computes; one event loop serves all clients, and slow work runs in threads.
"""
