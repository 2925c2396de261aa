"""The demo model's training text: TOML files written by hand, and the code that draws examples from them."""
