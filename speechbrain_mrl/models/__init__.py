"""The networks, their releases, and combinations of them."""
