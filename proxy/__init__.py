"""The proxy: HTTP edge, data path, energy accounting and export."""
