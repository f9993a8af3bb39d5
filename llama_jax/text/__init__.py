"""Text and token ids: tokenizers, chat templates, and the sandbox that runs templates."""
