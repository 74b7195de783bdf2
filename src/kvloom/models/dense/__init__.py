"""Keys and values as dense tensors, for models that compute their attention themselves."""
