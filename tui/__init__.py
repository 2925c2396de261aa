"""The screen of a node: a Textual app over what a node tells of itself. Nothing below this package knows Textual."""
