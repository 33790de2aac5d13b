"""How fast, and how close to what the machine can do."""
