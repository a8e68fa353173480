"""Small generated worlds, and the tiny models that ship with them."""
