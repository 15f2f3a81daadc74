"""How fast algorithms learn, and how fast replay is."""
