"""An OpenAI-compatible HTTP server on one engine (docs/server.md).

From a socket inwards: `connections` (slow and stalled clients), `guard` (who may ask, and how much), `app` (routes),
`asking` (bodies into requests of the engine), `answering` (answers and events). Nothing here computes; one
event loop serves everybody, and what takes long runs in threads.
"""
