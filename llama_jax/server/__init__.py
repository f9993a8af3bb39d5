"""An HTTP server on one engine, for the clients of OpenAI and Anthropic (docs/server.md).

From a socket inwards: `connections` (slow and stalled clients), `guard` (who may ask, and how much), `app` (routes),
`apis` (other APIs into OpenAI's and back), `asking` (bodies into requests of the engine), `answering` (answers and
chunks). Nothing here computes; one event loop serves everybody, and what takes long runs in threads.
"""
