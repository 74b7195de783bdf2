"""Images and videos: what a sequence shows, what a vision encoder makes of it, and how a model is handed that."""
