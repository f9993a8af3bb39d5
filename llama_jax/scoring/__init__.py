"""Log-likelihoods of given texts: pairs of context and continuation, long texts, perplexity, and lm-eval's tasks."""

from llama_jax.scoring.api import RollingScore, Score, perplexity, score, score_rolling

__all__ = ["RollingScore", "Score", "perplexity", "score", "score_rolling"]
