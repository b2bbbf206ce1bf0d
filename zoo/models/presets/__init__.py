"""The sizes and choices of published models, by name."""
