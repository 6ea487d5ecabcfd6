"""The one loop over blocks, and everything known before it starts."""
