"""Small models that ship with the project, and the scripts that made them."""
