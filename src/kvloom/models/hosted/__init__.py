"""Models of transformers, which their owners lend us: attached by the attention interface, else the cache interface."""
