"""The world, one technology a room. An adapter knows `core` and `seams`, and never another adapter."""
