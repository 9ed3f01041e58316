"""Reading hardware meters."""
