"""Floor 5: logits in, decisions out. Knows neither the cache nor the model."""
