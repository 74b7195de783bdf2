"""What is proven of a model when it is attached, or when it is first asked for."""
