"""`osdn eval`: perplexity by position, recall, lm-evaluation-harness; results that say what they are results of."""
