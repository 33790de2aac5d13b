"""What an optimization costs in quality, as numbers."""
